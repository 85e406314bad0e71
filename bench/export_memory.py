"""Memory and time of an export, verification included: ``python -m qwenforge.bench.export_memory --geometry 1.5b``.

``qwenforge export`` runs in a process of its own, on a checkpoint with random weights. Its largest resident memory,
mapped file pages included, must stay within 1.2 GB plus twice the largest tensor of the export.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwenforge.bench.circumstances import circumstances
from qwenforge.bench.geometries import GEOMETRIES, tensor_shapes, write_checkpoint
from qwenforge.bench.report_file import check_report_file, write_report
from qwenforge.engine.planning.plan import EXPORT_FIXED_BYTES
from qwenforge.errors import UserError

EXAMPLE = "python -m qwenforge.bench.export_memory --geometry 1.5b --work /tmp/export-memory --json memory.json"
FIXED_BYTES = EXPORT_FIXED_BYTES
ELEMENT_BYTES = {"fp32": 4, "fp16": 2}

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class ExportRun:
    """What one export took.

    Attributes:
        wall_seconds: of the process, start of the interpreter included.
        stage_seconds: of each stage, as the export reports them.
        peak_rss_bytes: largest resident memory of the process.
        stage_peak_rss_bytes: largest resident memory seen during each stage; samples, so at most the peak.
        report: what ``qwenforge export --json`` printed.
    """

    wall_seconds: float
    stage_seconds: dict[str, float]
    peak_rss_bytes: int
    stage_peak_rss_bytes: dict[str, int]
    report: dict[str, Any] = field(repr=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code is 1 when the bound is missed or the export fails."""
    args = _parser().parse_args(arguments)
    try:
        if args.json is not None:
            check_report_file(args.json)
        report = measure_export(args)
        _print(report)
        if args.json is not None:
            write_report(args.json, report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if report["within_bound"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwenforge.bench.export_memory",
        description="Export a checkpoint of random weights and compare the process's peak memory with the bound of "
        "1.2 GB plus twice the largest tensor. The checkpoint is made in --work on the first run and kept; the bundle "
        "is removed. Exits 1 when the bound is missed.",
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="1.5b", help="default: 1.5b")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for checkpoint and bundle")
    parser.add_argument("--stored", choices=("bf16", "fp16", "fp32"), default="bf16", help="checkpoint (default: bf16)")
    parser.add_argument("--dtype", choices=list(ELEMENT_BYTES), default="fp32", help="of the export (default: fp32)")
    parser.add_argument("--target", default="ort-cpu", help="of the export (default: ort-cpu)")
    parser.add_argument("--weights", choices=("copy", "link"), default="copy", help="of the export (default: copy)")
    parser.add_argument("--no-verify", action="store_true", help="export without the comparison with transformers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to FILE")
    return parser


def measure_export(args: argparse.Namespace) -> dict[str, Any]:
    """Export once; see :func:`main` for the arguments.

    Returns:
        The circumstances, ``settings``, ``bound_bytes``, ``within_bound`` and the fields of :class:`ExportRun`.

    Raises:
        UserError: the export fails.
    """
    checkpoint = write_checkpoint(args.work / f"{args.geometry}-{args.stored}", args.geometry, dtype=args.stored)
    options = ["--target", args.target, "--dtype", args.dtype, "--weights", args.weights]
    if args.no_verify:
        options.append("--no-verify")
    with tempfile.TemporaryDirectory(prefix="export-", dir=args.work) as folder:
        run = run_export(checkpoint, Path(folder) / f"{args.geometry}-bundle", options)
    bound = bound_bytes(args.geometry, args.dtype)
    return {
        **circumstances(),
        "settings": {
            "geometry": args.geometry,
            "stored": args.stored,
            "dtype": args.dtype,
            "target": args.target,
            "weights": args.weights,
            "verify": not args.no_verify,
        },
        "bound_bytes": bound,
        "within_bound": run.peak_rss_bytes <= bound,
        **asdict(run),
    }


def bound_bytes(geometry: str, dtype: str) -> int:
    """The memory that an export of ``geometry`` to ``dtype`` may take."""
    shapes = tensor_shapes(GEOMETRIES[geometry]).values()
    largest = max(math.prod(shape) for shape in shapes)
    return FIXED_BYTES + 2 * largest * ELEMENT_BYTES[dtype]


def run_export(checkpoint: Path, bundle: Path, options: Sequence[str]) -> ExportRun:
    """Run ``qwenforge export`` in a process of its own and watch its memory.

    Args:
        checkpoint: a Hugging Face folder.
        bundle: where the export goes.
        options: further arguments of the command.

    Raises:
        UserError: the export fails; its own message is on standard error.
    """
    command = [sys.executable, "-m", "qwenforge", "export", str(checkpoint), "-o", str(bundle), "--json", *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    watch = _Watch(process.pid)
    watch.start()
    output = process.stdout.read()  # ends with the export's last act, so that the stages end here
    end = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watch.join()
    if process.returncode:
        raise UserError(f"the export of {checkpoint} failed with exit code {process.returncode}; see its message above")
    report = json.loads(output)
    # The maximum that the system keeps starts from ours at the fork: it counts only where there is nothing else.
    kept = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return ExportRun(
        wall_seconds=end - start,
        stage_seconds=report["seconds"],
        # The kernel counts by thread and adds up now and then: its own maximum can lag behind a sample.
        peak_rss_bytes=max((watch.peak_bytes, *(size for _, size in watch.samples))) or kept,
        stage_peak_rss_bytes=_peaks(watch.samples, report["seconds"], end),
        report={name: value for name, value in report.items() if name not in ("bundle", "seconds", "rules")},
    )


class _Watch(threading.Thread):
    """Samples a process's resident memory until it ends; without /proc it sees nothing."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int]] = []
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")

    def run(self) -> None:
        """Sample."""
        while True:
            try:
                fields = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
            except (FileNotFoundError, ProcessLookupError):
                return
            if "VmRSS" not in fields:  # ended, not yet waited for
                return
            self.samples.append((time.perf_counter(), _kilobytes(fields["VmRSS"])))
            self.peak_bytes = _kilobytes(fields["VmHWM"])
            time.sleep(_SAMPLE_SECONDS)


def _kilobytes(value: str) -> int:
    return int(value.split()[0]) * 1024


def _peaks(samples: list[tuple[float, int]], seconds: dict[str, float], end: float) -> dict[str, int]:
    """The largest sample of each stage; the stages follow one another and the last ends at ``end``."""
    start = end - sum(seconds.values())
    peaks = {"start": max((value for at, value in samples if at < start), default=0)}
    for stage, duration in seconds.items():
        peaks[stage] = max((value for at, value in samples if start <= at < start + duration), default=0)
        start += duration
    return peaks


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = report["settings"]
    verify = "verified" if settings["verify"] else "not verified"
    title = f"export of {settings['geometry']}, {settings['stored']} to {settings['dtype']}, {verify}"
    table = Table(title=title)
    for column in ("stage", "seconds", "peak RSS MB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, peak in report["stage_peak_rss_bytes"].items():
        seconds = report["stage_seconds"].get(stage, report["wall_seconds"] - sum(report["stage_seconds"].values()))
        table.add_row(stage, f"{seconds:.1f}", f"{peak / 1e6:.0f}")
    console = Console()
    console.print(table)
    verdict = "within" if report["within_bound"] else "ABOVE"
    console.print(
        f"{report['wall_seconds']:.1f} s; peak {report['peak_rss_bytes'] / 1e6:.0f} MB, {verdict} the bound of "
        f"{report['bound_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
