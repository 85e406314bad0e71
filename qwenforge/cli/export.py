"""``qwenforge export``: a checkpoint in, a verified bundle out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
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
from qwenforge.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from qwenforge.engine.accuracy_report import QuantizationOutcome
    from qwenforge.engine.export import ExportReport
    from qwenforge.engine.quantization_request import QuantizationRequest
    from qwenforge.engine.static_scales import ScalesOutcome, ScalesRequest
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
        "qwenforge export examples/checkpoints/tiny-qwen2 -o tiny-trt --target tensorrt --device jetson-orin-nano\n"
        "qwenforge export examples/checkpoints/tiny-qwen2 -o tiny-int8 --quantize int8-weight-only --budget kl=0.01\n"
        "qwenforge export examples/checkpoints/tiny-qwen2 -o tiny-int4 --quantize int4-weight-only --kernels qwenforge"
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
        parser.add_argument(
            "--dequantize",
            action="store_true",
            help="store the weights of a checkpoint that is quantized already (GPTQ, AWQ, FP8...) in --dtype",
        )
        parser.add_argument(
            "--static-scales",
            choices=("apply", "ignore"),
            default="apply",
            help="of a quantized checkpoint that brings static scales for activations or caches: quantize both by them "
            "where the target can (default), or leave both in --dtype",
        )
        parser.add_argument(
            "--kernels",
            choices=("qwenforge", "onnxruntime"),
            help="of an ort-cpu bundle with quantized weights and unquantized activations: ours, which the runtime has "
            "to have as well, or ONNX Runtime's own (default: ours where they are installed and the processor has "
            "AVX-512 VNNI or AVX2)",
        )
        add_lowering_choice(parser)
        _add_quantization(parser)
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
            "dequantize": args.dequantize,
            "quantization": _quantization(args),
            "static_scales": _static_scales(args),
            "kernels": args.kernels,
            "cache": args.cache if args.cache == _FP32 else None,
        }
        try:
            report = _export_with_progress(args, options)
        except KeyboardInterrupt:
            _tell_work_folder(options["quantization"], Path(args.output))
            raise
        # On a terminal the text that follows has them, and once is enough.
        if args.json or not sys.stdout.isatty():
            for warning in report.quantization.warnings if report.quantization is not None else ():
                print(f"qwenforge: warning: {warning}", file=sys.stderr)
        for sentence in report.scales_left_out:
            print(f"qwenforge: {sentence}", file=sys.stderr)
        if args.json:
            print(json.dumps(_as_json(report), indent=1))
        else:
            _print(report)
        return EXIT_DONE


def _tell_work_folder(request: QuantizationRequest | None, output: Path) -> None:
    """Say where an interrupted calibration can be taken up."""
    from qwenforge.engine.quantized_export import default_work_folder

    folder = None if request is None else request.work_folder or default_work_folder(output)
    if folder is not None and folder.is_dir():
        print(f"qwenforge: what was calibrated is kept in {folder}; the same command goes on there", file=sys.stderr)


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "quantization",
        "The result is compared with the unquantized model on text that it was not calibrated on; beyond its budget it "
        "is not written. --budget and --heldout-data are also for the static scales of a quantized checkpoint.",
    )
    group.add_argument(
        "--quantize",
        metavar="RECIPE",
        help="int8-w8a8, int8-weight-only, int4-weight-only, fp8, or a recipe's .json file",
    )
    group.add_argument(
        "--calibration-data",
        type=Path,
        metavar="F",
        help="text, JSONL (text or messages) or a dataset's folder to calibrate on (default: a built-in sample)",
    )
    group.add_argument("--calibration-rows", type=positive_int, metavar="N", help="rows of it at most (default: 64)")
    group.add_argument(
        "--heldout-data",
        type=Path,
        metavar="F",
        help="text to judge by, none of the calibration's (default: another built-in sample)",
    )
    group.add_argument(
        "--override",
        action="append",
        metavar="SITE=FORMAT",
        help="an exception, such as 'model.layers.0.*=keep' or '*.down_proj=int8'; repeat it for more, the last counts",
    )
    group.add_argument(
        "--cache",
        choices=("int8", "fp8", _FP32),
        help="int8, fp8: also quantize the key/value cache, on a GPU; fp32: keep it in fp32 with our CPU kernels "
        "(--kernels qwenforge), which by default have it in fp16, of half the size",
    )
    group.add_argument(
        "--budget",
        metavar="LIMITS",
        help="what may be lost, such as kl=0.02,ppl=1.02,top1=0.97: largest mean KL, largest ratio of perplexities, "
        "smallest agreement of the best token (default: the recipe's)",
    )
    group.add_argument(
        "--auto", action="store_true", help="leave the fewest bytes in higher precision with which the budget holds"
    )
    group.add_argument(
        "--optimize",
        choices=("latency", "memory"),
        help="of an ort-cpu bundle: a second form of the weights for prompts beside the one for decoding (latency, the "
        "default), or one for both; one graph of our kernels (--kernels qwenforge) does either, and nothing changes",
    )
    group.add_argument(
        "--work-folder",
        type=Path,
        metavar="W",
        help="where calibration keeps its state, to be taken up again (default: hidden beside the bundle, until done)",
    )


_FP32 = "fp32"

_NEEDS_RECIPE = (
    "calibration_data",
    "calibration_rows",
    "override",
    "cache",
    "optimize",
    "work_folder",
)


def _quantization(args: argparse.Namespace) -> QuantizationRequest | None:
    """What the arguments ask for; None without ``--quantize``.

    Raises:
        UserError: they cannot be understood, or belong to a quantization that is not asked for.
    """
    if args.quantize is None:
        lonely = [name for name in _NEEDS_RECIPE if getattr(args, name) is not None] + ["auto"] * args.auto
        if args.cache == _FP32:  # also of a checkpoint that is quantized already
            lonely.remove("cache")
        if lonely:
            raise UserError(f"--{lonely[0].replace('_', '-')} goes with --quantize RECIPE; add it or leave this out.")
        return None
    from qwenforge.engine.quantization_request import quantization_request

    return quantization_request(
        args.quantize,
        overrides=args.override or (),
        cache=args.cache if args.cache != _FP32 else None,
        budget=args.budget,
        calibration_data=args.calibration_data,
        calibration_rows=args.calibration_rows,
        heldout_data=args.heldout_data,
        auto=args.auto,
        optimize=args.optimize or "latency",
        work_folder=args.work_folder,
    )


def _static_scales(args: argparse.Namespace) -> ScalesRequest | None:
    """What the arguments say of a quantized checkpoint's static scales; None with ``--quantize``.

    Raises:
        UserError: they are asked for beside ``--quantize``.
    """
    if args.quantize is not None:
        if args.static_scales == "ignore":
            raise UserError(
                "--static-scales is for checkpoints that are quantized already; leave it or --quantize out."
            )
        return None
    from qwenforge.engine.static_scales import ScalesRequest

    return ScalesRequest(apply=args.static_scales == "apply", budget=args.budget, heldout_data=args.heldout_data)


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
        "ort_cpu": report.ort_cpu.model_dump() if report.ort_cpu is not None else None,
        "quantization": report.quantization.to_json() if report.quantization is not None else None,
        "static_scales": report.static_scales.to_json() if report.static_scales is not None else None,
        "static_scales_left_out": list(report.scales_left_out),
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


def _print_quantization(console: Console, outcome: QuantizationOutcome) -> None:
    figures, budget = outcome.run.distributions, outcome.budget
    if outcome.frontier is not None:
        _print_frontier(console, outcome)
    console.print(
        f"quantized by {outcome.recipe.name}: {outcome.unquantized_bytes / 1e6:.1f} -> "
        f"{outcome.quantized_bytes / 1e6:.1f} MB; on {figures.positions} tokens of {outcome.run.source} mean KL "
        f"{figures.mean_kl:.2g} (budget {budget.kl:g}), perplexity x {figures.perplexity_ratio:.4f} ({budget.ppl:g}), "
        f"best token agrees at {figures.top1_agreement:.1%} ({budget.top1:.1%}); accuracy.html in the bundle has more",
        markup=False,
    )
    if outcome.warnings:
        console.print(f"with {len(outcome.warnings)} warning{'s' * (len(outcome.warnings) > 1)}:", markup=False)
        for warning in outcome.warnings:
            console.print(f"  - {warning}", markup=False)


def _print_static_scales(console: Console, outcome: ScalesOutcome) -> None:
    figures, budget = outcome.run.distributions, outcome.budget
    console.print(
        f"applied the checkpoint's static scales, {outcome.applied}; against the weights alone, on {figures.positions} "
        f"tokens of {outcome.run.source}, mean KL {figures.mean_kl:.2g} (budget {budget.kl:g}), perplexity x "
        f"{figures.perplexity_ratio:.4f} ({budget.ppl:g}), best token agrees at {figures.top1_agreement:.1%} "
        f"({budget.top1:.1%})",
        markup=False,
    )


def _print_frontier(console: Console, outcome: QuantizationOutcome) -> None:
    """The choices that ``--auto`` weighed, smallest first."""
    from rich import box
    from rich.table import Table

    from qwenforge.calibration.sensitivity import overrides_of

    frontier = outcome.frontier
    assert frontier is not None
    table = Table(title="size and accuracy", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("MB", "mean KL", "perplexity", "top-1"):
        table.add_column(heading, justify="right")
    table.add_column("holds")
    table.add_column("in higher precision")
    for index, point in enumerate(frontier.points):
        raised = ", ".join(f"{group} {level}" for group, level in list(point.raised.items())[:2])
        raised += f" and {len(point.raised) - 2} more" if len(point.raised) > 2 else ""
        table.add_row(
            f"{point.bytes / 1e6:.2f}",
            f"{point.accuracy.mean_kl:.2g}",
            f"x {point.accuracy.perplexity_ratio:.4f}",
            f"{point.accuracy.top1_agreement:.1%}",
            ("yes" if point.holds else "no") + (", chosen" if index == frontier.chosen else ""),
            raised or "nothing",
        )
    console.print(table)
    if chosen := frontier.choice:
        console.print("chosen, as arguments:", *(f"--override '{each}'" for each in overrides_of(chosen)), markup=False)


def _print(report: ExportReport) -> None:
    from rich.console import Console
    from rich.markup import escape

    from qwenforge.engine.bundle_summary import KERNELS_OF

    console = Console(highlight=False, soft_wrap=True)
    size = report.data_bytes / 1e6
    linked = f", {report.linked_bytes / 1e6:.1f} MB linked" if report.linked_bytes else ""
    console.print(f"wrote {escape(str(report.bundle))}: {report.target} {report.dtype}, {report.nodes} nodes, ", end="")
    console.print(f"{size:.1f} MB of weights{linked} in {sum(report.seconds.values()):.1f} s")
    if report.lowering is not None:
        console.print(_lowering(report.lowering), markup=False)
    if report.ort_cuda is not None:
        console.print(_ort_cuda(report.ort_cuda), markup=False)
    if report.ort_cpu is not None:
        caches = f"; caches in {report.ort_cpu.cache}"
        console.print(f"kernels: {KERNELS_OF[report.ort_cpu.kernels]}; {report.ort_cpu.basis}{caches}", markup=False)
    if report.quantization is not None:
        _print_quantization(console, report.quantization)
    if report.static_scales is not None:
        _print_static_scales(console, report.static_scales)
    verification = report.verification
    if verification is None:
        console.print("not verified (--no-verify)")
        return
    console.print(
        f"verified against transformers ({verification.method}): max logit error {verification.max_abs_error:.1e} "
        f"(bound {verification.bound:.1e}), max KL {verification.max_kl:.1e}, tokens agree at "
        f"{verification.positions - verification.token_disagreements}/{verification.positions} positions"
    )
