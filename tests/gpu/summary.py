"""Sums up a run of tests/gpu/run.sh: report.json, and lines to read. 1 when a test failed or nothing was timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

OURS = ("eight", "sixteen", "wide", "grouped")


def main(folder: Path) -> int:
    """Write report.json and print the best path of every row beside the best peer."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    parts = {}
    for line in (folder / "parts.txt").read_text(encoding="utf-8").splitlines():
        name, code, seconds = line.split()
        words = folder / f"{name}.txt"
        last = words.read_text(encoding="utf-8", errors="replace").splitlines()[-1:] if words.is_file() else []
        parts[name] = {"exit_code": int(code), "seconds": int(seconds), "last_line": "".join(last)[:300]}
    report: dict[str, Any] = {
        "commit": commit or "unknown",
        "gpu": (folder / "gpu.txt").read_text(encoding="utf-8").strip(),
        "parts": parts,
    }
    for name in ("times", "attention"):
        found = folder / f"{name}.json"
        report[name] = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else None
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in (report["times"] or {}).get("moe", []):
        if "times" in row:
            print(summary_line(row))
    for name, part in parts.items():
        print(f"{name:<12} exit {part['exit_code']:>3}  {part['seconds']:>4} s  {part['last_line']}")
    return int(any(parts[name]["exit_code"] != 0 for name in ("first", "correctness", "times")))


def summary_line(row: dict[str, Any]) -> str:
    """``Qwen3-30B-A3B int8 T=64 uniform: wide 150.0 us, 91 % of floor; 1.30x torch grouped_mm``."""
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
    return text


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
