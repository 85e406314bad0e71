"""``qwenforge build``: a TensorRT bundle in, an engine in it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenforge.cli.arguments import add_bundle, add_json, positive_int
from qwenforge.cli.base import EXIT_DONE, Command
from qwenforge.devices import DEVICES

if TYPE_CHECKING:
    from qwenforge.engine.tensorrt.build import BuildReport
    from qwenforge.engine.tensorrt.options import BuildOptions

_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30}


class BuildCommand(Command):
    """Compile a bundle's graph into a TensorRT engine."""

    name = "build"
    help = "compile the engine of a TensorRT bundle"
    description = (
        "Compile the graph of a bundle that was exported for tensorrt or tensorrt-rtx into an engine, and put it into "
        "the bundle together with what it was built for. TensorRT builds for the GPU it runs on; TensorRT for RTX "
        "builds for all its GPUs anywhere, a machine without one included. Ctrl-C leaves the bundle as it was."
    )
    example = (
        "qwenforge build tiny-trt --device h200 --typical-prompt 1024 --typical-batch 4\n"
        "qwenforge build tiny-rtx --target tensorrt-rtx --json"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_bundle(parser)
        parser.add_argument(
            "--device", metavar="D", help=f"what to build for (default: the bundle's): {', '.join(DEVICES)}"
        )
        parser.add_argument("--target", metavar="TARGET", help="make sure that the bundle is for this target")
        profiles = parser.add_argument_group("what the engine is tuned for")
        for flag, what in (
            ("--typical-prompt", "prompt tokens it is fastest at (default: 512)"),
            ("--typical-batch", "rows it is fastest at (default: 1)"),
            ("--max-length", "longest prompt (default: what the bundle's caches hold)"),
            ("--max-batch", "largest batch (default: the bundle's)"),
        ):
            profiles.add_argument(flag, type=positive_int, metavar="N", help=what)
        builder = parser.add_argument_group("the builder")
        builder.add_argument("--plugin-library", type=Path, metavar="FILE", help="libqwenforge_plugins.so to use")
        builder.add_argument(
            "--workspace", type=_bytes, metavar="SIZE", help="largest workspace of a layer, such as 2G (default: any)"
        )
        builder.add_argument(
            "--optimization-level", type=int, metavar="0-5", help="0 builds fast, 5 searches long (default: TensorRT's)"
        )
        builder.add_argument(
            "--timing-cache",
            metavar="FILE|none",
            default="",
            help="timings to reuse and add to (default: one a device, version and driver, in the user's cache folder)",
        )
        builder.add_argument("--version-compatible", action="store_true", help="let later TensorRT versions load it")
        builder.add_argument(
            "--hardware-compatible",
            choices=("none", "ampere+", "same-cc"),
            default="none",
            help="let other GPUs run it: all from Ampere on, or those of the same compute capability",
        )
        builder.add_argument(
            "--weight-streaming", action="store_true", help="let weights stay in host memory when it runs"
        )
        builder.add_argument(
            "--strip-weights", action="store_true", help="leave weights out; it is refitted from model.onnx when loaded"
        )
        builder.add_argument("--no-memory-check", action="store_true", help="build even if memory seems too small")
        builder.add_argument("--rebuild", action="store_true", help="build even if the bundle holds just this engine")
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Build, and print what was built; UserError when something is missing or does not go together."""
        report = _build_with_progress(args.bundle, _options(args))
        if args.json:
            print(json.dumps(_as_json(report), indent=1))
        else:
            _print(report)
        return EXIT_DONE


def _options(args: argparse.Namespace) -> BuildOptions:
    from qwenforge.engine.tensorrt.options import BuildOptions
    from qwenforge.engine.tensorrt.profiles import Sizes

    return BuildOptions(
        target=args.target,
        device=args.device,
        sizes=Sizes(args.max_length, args.max_batch, args.typical_prompt, args.typical_batch),
        workspace_bytes=args.workspace,
        optimization_level=args.optimization_level,
        timing_cache=None if args.timing_cache == "none" else Path(args.timing_cache),
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        weight_streaming=args.weight_streaming,
        strip_weights=args.strip_weights,
        plugin_library=args.plugin_library,
        rebuild=args.rebuild,
        check_memory=not args.no_memory_check,
    )


def _build_with_progress(bundle: Path, options: BuildOptions) -> BuildReport:
    """Build, drawing the progress where standard error is a terminal and writing nothing there where it is not."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from qwenforge.cli.interrupts import raise_if_interrupted
    from qwenforge.engine.tensorrt.build import build_engine

    console = Console(stderr=True)
    if not console.is_interactive:
        return build_engine(bundle, options, progress=lambda *_: raise_if_interrupted())
    columns = (TextColumn("{task.description:<44.44}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("check", total=1.0)

        def show(what: str, done: float) -> None:
            raise_if_interrupted()
            progress.update(task, description=what, completed=done)

        return build_engine(bundle, options, progress=show)


def _as_json(report: BuildReport) -> dict[str, Any]:
    record = report.record.model_dump(mode="json")
    return {
        "bundle": str(report.bundle),
        "built": report.built,
        "engine_bytes": report.engine_bytes,
        "memory_bound_bytes": report.memory_bound,
        "engine": record,
        "warnings": list(report.warnings),
    }


def _print(report: BuildReport) -> None:
    from rich.console import Console

    from qwenforge.engine.units import size

    record = report.record
    console = Console(highlight=False, soft_wrap=True)
    where = f"{record.device} (SM {record.sm})" if record.device else "every device of TensorRT for RTX"
    what = f"{report.bundle / record.file}: {size(report.engine_bytes)}, {record.layers} layers"
    by = f"{record.module} {record.tensorrt}"
    if not report.built:
        console.print(f"up to date: {what}, built by {by} for {where}; --rebuild builds it again", markup=False)
        return
    console.print(f"wrote {what}, by {by} for {where}", markup=False)
    memory = f"{size(record.peak_build_bytes)} of memory" if record.peak_build_bytes else "memory not measured"
    console.print(f"{record.build_seconds:.1f} s, {memory} (bound {size(report.memory_bound)})", markup=False)
    for profile in record.profiles:
        rows, tokens = profile.maximum["input_ids"]
        typical = " x ".join(str(value) for value in profile.typical["input_ids"])
        console.print(f"{profile.name}: up to {rows} x {tokens} tokens, tuned for {typical}", markup=False)


def _bytes(text: str) -> int:
    """argparse type: a number of bytes, with K, M or G for powers of 1024."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in _UNITS else (text, "")
    value = int(number) * _UNITS.get(unit, 1)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a size")
    return value


_bytes.__name__ = "size"
"""argparse names the type in 'invalid size value'."""
