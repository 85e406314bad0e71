"""The whole story on both example checkpoints: export, verify, generate, measure, quantize. ``make demo`` runs it.

Everything goes through the command line, as a user would type it; each command is shown before it runs.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ("tiny-qwen2", "tiny-qwen2-moe")
QUANTIZED = "tiny-qwen2-moe"
INT4 = ("--quantize", "int4-weight-only", "--calibration-rows", "64")
OUTPUT = Path("demo-output")
PROMPT = "Return a copy of the string with"
WORKLOAD = ("--prompt-tokens", "128", "--new-tokens", "64", "--runs", "3")


def main() -> int:
    """Run the demo in the repository's root; the exit code is that of the first command that failed, or 0."""
    started = time.perf_counter()
    measured: dict[str, Any] = {}
    for name in CHECKPOINTS:
        checkpoint = Path("examples/checkpoints") / name
        bundle = OUTPUT / name
        figures = OUTPUT / f"{name}-latency.json"
        for arguments in (
            ("export", checkpoint, "-o", bundle, "--target", "ort-cpu"),
            ("run", bundle, "--prompt", PROMPT, "--max-new-tokens", "48"),
            ("bench", bundle, *WORKLOAD, "--against", "transformers", "--checkpoint", checkpoint, "--json", figures),
        ):
            code = _qwenforge([str(argument) for argument in arguments])
            if code != 0:
                return code
        measured[name] = json.loads((ROOT / figures).read_text())
    quantized = OUTPUT / f"{QUANTIZED}-int4"
    for arguments in (
        ("export", Path("examples/checkpoints") / QUANTIZED, "-o", quantized, *INT4),
        ("run", quantized, "--prompt", PROMPT, "--max-new-tokens", "48"),
    ):
        code = _qwenforge([str(argument) for argument in arguments])
        if code != 0:
            return code
    print()
    print_latencies(measured)
    print(f"\ndone in {time.perf_counter() - started:.0f} s; the bundles are in {OUTPUT}/")
    return 0


def _qwenforge(arguments: Sequence[str]) -> int:
    print(f"\n$ qwenforge {shlex.join(arguments)}", flush=True)
    (ROOT / OUTPUT).mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-m", "qwenforge", *arguments], cwd=ROOT, check=False).returncode


def print_latencies(measured: dict[str, Any]) -> None:
    """One table of both checkpoints, from what ``qwenforge bench --json`` wrote for each."""
    from rich.console import Console
    from rich.table import Table

    workload = next(iter(measured.values()))["workload"]
    table = Table(
        title=f"latency: {workload['prompt_tokens']} prompt + {workload['new_tokens']} new tokens, batch "
        f"{workload['batch']}, {workload['threads']} threads, median of {workload['runs']} runs"
    )
    for heading in ("checkpoint", "engine"):
        table.add_column(heading)
    for heading in ("TTFT ms", "ITL p50 ms", "tokens/s", "peak RSS MB", "decode speed-up"):
        table.add_column(heading, justify="right")
    for name, report in measured.items():
        first = report["subjects"][0]
        for subject in report["subjects"]:
            speed_up = first["tokens_per_second"]["median"] / subject["tokens_per_second"]["median"]
            table.add_row(
                name,
                subject["description"],
                f"{subject['ttft_ms']['median']:.1f}",
                f"{subject['itl_ms']['p50']:.2f}",
                f"{subject['tokens_per_second']['median']:.0f}",
                f"{subject['peak_rss_bytes'] / 1e6:.0f}",
                "" if subject is first else f"{speed_up:.1f}x",
            )
        table.add_section()
    console = Console()
    # Nothing is cut off where the output is not a terminal (80 columns) or a narrow one.
    console.width = max(console.width, 110)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
