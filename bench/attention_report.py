"""Rows of :mod:`qwenforge.bench.attention_rows` in words: what is wrong, what was reached, which path to take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

PATHS = ("plain", "split", "tiled")
LARGE_CACHE_BYTES = 256e6
BANDWIDTH_TARGET = 85.0
"""Percent of the copy bandwidth to reach where the caches read are larger than LARGE_CACHE_BYTES."""
LARGEST_DIFFERENCE = {"output": 0.03, "append": 0.01}
"""Above what bf16 explains (tests/support/tolerances.py), relative to the largest number."""
WORTH_A_CHANGE = 1.05
"""The library's path is not called wrong for less than this factor: medians of a few rounds."""


def label(row: dict[str, Any]) -> str:
    """``Qwen2-7B int8 decode B=8 keys=4096``; a prompt also says how many of the keys are new."""
    new = "" if row["kind"] == "decode" else f" new={row['new']}"
    return f"{row['heads']} {row['cache']} {row['kind']} B={row['batch']}{new} keys={row['keys']}"


def medians(row: dict[str, Any]) -> dict[str, float]:
    """Microseconds by name."""
    return {name: float(time["us"]["median"]) for name, time in row.get("times", {}).items()}


def line(row: dict[str, Any]) -> str:
    """``Qwen2-7B bf16 decode B=8 keys=4096: split 20.0 us, 88 % of bandwidth; 1.30x torch flash folded``."""
    times = medians(row)
    if "times" not in row or not times.keys() & {*PATHS}:
        return f"{label(row)}: {row['left_out']}"
    name = row["auto"] if row["auto"] in times else row["best"]
    part, what = ("percent_of_bandwidth", "bandwidth") if row["bound"] == "memory" else ("percent_of_rate", "bf16 rate")
    text = f"{label(row)}: {name} {times[name]:.1f} us, {row['times'][name][part]:.0f} % of {what}"
    peers = {peer: time for peer, time in times.items() if peer not in PATHS}
    if peers:
        peer = min(peers, key=lambda one: peers[one])
        text += f"; {peers[peer] / times[name]:.2f}x {peer}"
    return "; WRONG: ".join([text, *wrong(row)])


def wrong(row: dict[str, Any]) -> list[str]:
    """What a row says that must not be, of ours and of the peers, whose times would mean nothing."""
    found = [f"replays of {path} gave other bits" for path in row.get("bits_changed", [])]
    for name, value in row.items():
        for kind, most in LARGEST_DIFFERENCE.items():
            if name.endswith(f"_{kind}_difference") and not value <= most:
                found.append(f"{name} {value:.3g}")
    return found


def paths_to_change(rows: Iterable[dict[str, Any]]) -> list[str]:
    """For ``chosenPath`` of plugins/attention/attention.cu: where another path is faster than the library's."""
    found = []
    for row in rows:
        times = medians(row)
        auto, best = row.get("auto"), row.get("best")
        if best is None or auto == best:
            continue
        if auto not in times:
            found.append(f"{label(row)}: {best}; the library's {auto} was not timed")
        elif times[auto] > WORTH_A_CHANGE * times[best]:
            found.append(f"{label(row)}: {best}, {times[auto] / times[best]:.2f}x faster than the library's {auto}")
    return found


def targets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How often the two targets were met: the bandwidth of large caches, and faster than every peer."""
    timed = [row for row in rows if row.get("auto") in medians(row)]
    large = [row for row in timed if row["kind"] == "decode" and row["cache_bytes"] > LARGE_CACHE_BYTES]
    reached = [row["times"][row["auto"]]["percent_of_bandwidth"] for row in large]
    said = []
    if reached:
        good = sum(value >= BANDWIDTH_TARGET for value in reached)
        said.append(
            f"{good} of {len(reached)} decode rows with more than {LARGE_CACHE_BYTES / 1e6:.0f} MB of cache reach "
            f"{BANDWIDTH_TARGET:.0f} % of the copy bandwidth; the least is {min(reached):.0f} %"
        )
    against = [(row, [time for name, time in medians(row).items() if name not in PATHS]) for row in timed]
    against = [(row, peers) for row, peers in against if peers]
    if against:
        won = sum(medians(row)[row["auto"]] < min(peers) for row, peers in against)
        said.append(f"{won} of {len(against)} rows with peers are faster than every peer")
    return said
