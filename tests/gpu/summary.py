"""Sums up a run of tests/gpu/run.sh: report.json, and lines to read. 1 when a test failed or nothing was timed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from qwenforge.bench import attention_report, gpu_model_table

OURS = ("eight", "sixteen", "wide", "grouped")
TESTS = tuple(
    prefix + name for prefix in ("", "attention-") for name in ("first", "correctness", "memcheck", "racecheck")
)
NO_SANITIZER = 3
"""Exit code of a part that could not run because compute-sanitizer does not work on this machine."""
LARGEST_DIFFERENCE = 0.05
"""Of a path from the reference or from another path, relative to the largest output: above the tolerances of the tests
for bf16 and FP8, and far below what a wrong index does."""


def main(folder: Path) -> int:
    """Write report.json and print the best path of every row beside the best peer, and models beside theirs."""
    report: dict[str, Any] = {
        "commit": commit(),
        "gpu": (folder / "gpu.txt").read_text(encoding="utf-8").strip(),
        "parts": parts((folder / "parts.txt").read_text(encoding="utf-8")),
    }
    for path in sorted(folder.glob("*.json")):
        if path.name != "report.json":
            report[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows = [row for name in ("peers", "times") for row in report.get(name, {}).get("moe", [])]
    for row in rows:
        print(summary_line(row))
    attention = report.get("attention-times", {}).get("attention", [])
    for row in attention:
        print(attention_report.line(row))
    for line in [*attention_report.paths_to_change(attention), *attention_report.targets(attention)]:
        print(line)
    models = report.get("models", {}).get("models", [])
    for line in gpu_model_table.table(models):
        print(line)
    for name, one in report["parts"].items():
        print(f"{name:<21} exit {one['exit_code']:>3}  {one['seconds']:>4} s  {one['last_line']}")
    codes = {name: one["exit_code"] for name, one in report["parts"].items()}
    planned = (folder / "planned.txt").read_text(encoding="utf-8").split()
    failed = [name for name in TESTS if name in planned and codes.get(name, 1) not in (0, NO_SANITIZER)]
    timed = any(row.get("times") for row in [*rows, *attention]) or any("itl_ms" in row for row in models)
    mistaken = any(map(wrong, rows)) or any(map(attention_report.wrong, attention))
    return int(bool(failed) or not timed or mistaken)


def commit() -> str:
    """COMMIT of the environment, else what git says of this folder, else ``unknown``."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def parts(text: str) -> dict[str, dict[str, Any]]:
    """Exit code, seconds and last line of each part, by name; 124 and 137 are those of one that met its time limit."""
    found = {}
    for line in text.splitlines():
        name, code, seconds, last = (*line.split(" ", 3), "")[:4]
        found[name] = {"exit_code": int(code), "seconds": int(seconds), "last_line": last}
    return found


def wrong(row: dict[str, Any]) -> list[str]:
    """What a row says that must not be."""
    found = [f"replays of {path} gave other bits" for path in row.get("bits_changed", [])]
    differences = {name: value for name, value in row.items() if "_difference" in name}
    return found + [f"{name} {value:.3g}" for name, value in differences.items() if not value <= LARGEST_DIFFERENCE]


def summary_line(row: dict[str, Any]) -> str:
    """``Qwen3-30B-A3B int8 T=64 uniform: wide 150.0 us, 91 % of floor; 1.30x torch grouped_mm``."""
    if "times" not in row:
        return f"{row['layer']} {row['weights']}: {row['left_out']}"
    medians = {name: time["us"]["median"] for name, time in row["times"].items()}
    ours = {name: time for name, time in medians.items() if name in OURS}
    label = f"{row['layer']} {row['weights']} T={row['tokens']} {row['routing']}:"
    if not ours:
        return f"{label} none of our paths ran: {row['left_out']}"
    best = min(ours, key=lambda name: ours[name])
    text = f"{label} {best} {ours[best]:.1f} us, {100 * row['floor_us'] / ours[best]:.0f} % of floor"
    peers = {name: time for name, time in medians.items() if name not in OURS}
    if peers:
        peer = min(peers, key=lambda name: peers[name])
        text += f"; {peers[peer] / ours[best]:.2f}x {peer}"
    return "; WRONG: ".join([text, *wrong(row)])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
