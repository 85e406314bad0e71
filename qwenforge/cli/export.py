"""``qwenforge export``: a checkpoint in, a verified bundle out."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from qwenforge.cli.arguments import (
    add_dtype,
    add_json,
    add_lowering_choice,
    add_target,
    lowering_choice,
    positive_int,
)
from qwenforge.cli.base import EXIT_DONE, Command

if TYPE_CHECKING:
    from qwenforge.engine.export import ExportReport
    from qwenforge.manifest import LoweringRecord, OrtCudaRecord


class ExportCommand(Command):
    """Export a Hugging Face checkpoint to a bundle."""

    name = "export"
    help = "turn a checkpoint into a verified bundle"
    description = (
        "Trace a Qwen2-family checkpoint to ONNX, fuse it, lower it to a target and write a bundle. The result is "
        "compared with transformers on the same checkpoint before the bundle appears; a wrong one is not written."
    )
    example = (
        "qwenforge export examples/checkpoints/tiny-qwen2 -o tiny-bundle --target ort-cpu\n"
        "qwenforge export examples/checkpoints/tiny-qwen2-moe -o tiny-cuda --target ort-cuda --dtype bf16\n"
        "qwenforge export examples/checkpoints/tiny-qwen2 -o tiny-trt --target tensorrt --device jetson-orin-nano"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json, safetensors, tokenizer")
        parser.add_argument("-o", "--output", required=True, metavar="BUNDLE", help="bundle folder to write")
        add_target(parser, default="ort-cpu")
        add_dtype(parser)
        parser.add_argument(
            "--weights",
            choices=("copy", "link"),
            default="copy",
            help="copy them into the bundle (default), or refer to the checkpoint's own bytes where they can be used "
            "as they are: seconds and megabytes, memory-mapped at run time",
        )
        parser.add_argument(
            "--max-length",
            type=positive_int,
            metavar="N",
            help="longest context (default: the model's, at most 32768; TensorRT, whose caches have this size: 4096)",
        )
        parser.add_argument(
            "--max-batch",
            type=positive_int,
            metavar="B",
            help="largest batch to allow (default: any; for TensorRT 8)",
        )
        parser.add_argument("--no-verify", action="store_true", help="skip the comparison with transformers (recorded)")
        parser.add_argument("--verify-passes", action="store_true", help="also compare the graph around every pass")
        add_lowering_choice(parser)
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        options: dict[str, Any] = {
            "target": args.target,
            "dtype": args.dtype,
            "weights": args.weights,
            "max_length": args.max_length,
            "max_batch": args.max_batch,
            "verify_result": not args.no_verify,
            "verify_passes": args.verify_passes,
            "choice": lowering_choice(args),
        }
        report = _export_with_progress(args, options)
        if args.json:
            print(json.dumps(_as_json(report), indent=1))
        else:
            _print(report)
        return EXIT_DONE


def _export_with_progress(args: argparse.Namespace, options: dict[str, Any]) -> ExportReport:
    """Export, drawing the progress where standard error is a terminal and writing nothing there where it is not."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from qwenforge.cli.interrupts import raise_if_interrupted
    from qwenforge.engine.export import export_checkpoint

    console = Console(stderr=True)
    if not console.is_interactive:
        return export_checkpoint(args.checkpoint, args.output, **options, progress=lambda *_: raise_if_interrupted())
    columns = (TextColumn("{task.description:<44.44}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("read checkpoint", total=1.0)

        def show(what: str, done: float) -> None:
            raise_if_interrupted()
            progress.update(task, description=what, completed=done)

        return export_checkpoint(args.checkpoint, args.output, **options, progress=show)


def _as_json(report: ExportReport) -> dict[str, Any]:
    verification = report.verification
    return {
        "bundle": str(report.bundle),
        "target": report.target,
        "dtype": report.dtype,
        "lowering": report.lowering.model_dump() if report.lowering is not None else None,
        "ort_cuda": report.ort_cuda.model_dump() if report.ort_cuda is not None else None,
        "nodes": report.nodes,
        "data_bytes": report.data_bytes,
        "linked_bytes": report.linked_bytes,
        "seconds": {stage: round(seconds, 3) for stage, seconds in report.seconds.items()},
        "rules": {step.rule: step.matches for step in report.steps},
        "verification": None
        if verification is None
        else {
            "method": verification.method,
            "prompts": verification.prompts,
            "positions": verification.positions,
            "max_abs_error": verification.max_abs_error,
            "bound": verification.bound,
            "mean_kl": verification.mean_kl,
            "max_kl": verification.max_kl,
            "token_disagreements": verification.token_disagreements,
            "near_ties": verification.near_ties,
        },
    }


def _lowering(record: LoweringRecord) -> str:
    where = f"{record.device} (SM {record.sm})" if record.device else "every device of TensorRT for RTX"
    version = "TensorRT for RTX" if record.tensorrt == "rtx" else f"TensorRT {record.tensorrt}"
    experts = "" if record.moe == "none" else f", experts {record.moe}"
    return (
        f"for {where}, {version}: attention {record.attention}{experts}, weights as {record.weights_as}; README.md in "
        "the bundle has the trtexec and polygraphy lines"
    )


def _ort_cuda(record: OrtCudaRecord) -> str:
    from qwenforge.ort_cuda_choice import needs_library

    experts = "" if record.moe == "none" else f", experts {record.moe}"
    library = "; needs libqwenforge_ort.so (make plugins)" if needs_library(record) else ""
    return f"attention {record.attention}{experts} ({record.basis}){library}"


def _print(report: ExportReport) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    size = report.data_bytes / 1e6
    linked = f", {report.linked_bytes / 1e6:.1f} MB linked" if report.linked_bytes else ""
    console.print(f"wrote {escape(str(report.bundle))}: {report.target} {report.dtype}, {report.nodes} nodes, ", end="")
    console.print(f"{size:.1f} MB of weights{linked} in {sum(report.seconds.values()):.1f} s")
    if report.lowering is not None:
        console.print(_lowering(report.lowering), markup=False)
    if report.ort_cuda is not None:
        console.print(_ort_cuda(report.ort_cuda), markup=False)
    verification = report.verification
    if verification is None:
        console.print("not verified (--no-verify)")
        return
    console.print(
        f"verified against transformers ({verification.method}): max logit error {verification.max_abs_error:.1e} "
        f"(bound {verification.bound:.1e}), max KL {verification.max_kl:.1e}, tokens agree at "
        f"{verification.positions - verification.token_disagreements}/{verification.positions} positions"
    )
