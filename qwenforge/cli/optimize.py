"""``qwenforge optimize``: the graph passes on anybody's ONNX model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qwenforge.cli.arguments import add_json, add_lowering_choice, add_target, lowering_choice, positive_int
from qwenforge.cli.base import EXIT_DONE, EXIT_USER_ERROR, Command
from qwenforge.errors import GraphError, UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qwenforge.graph_passes.pipeline import PipelineResult
    from qwenforge.graph_passes.scenario import Skipped


class Optimize(Command):
    """Fuse a foreign ONNX graph and lower it to a target, rule by rule."""

    name: ClassVar[str] = "optimize"
    help: ClassVar[str] = "run the graph passes on any ONNX model"
    description: ClassVar[str] = (
        "Fuse the graph of a Qwen2-family model that any exporter made (opset 18 to 24) and lower it to a target.\n"
        "With --verify the outputs are compared before and after every rule: a rule that moves them is named, its\n"
        "rewrite left out of the written model, and the exit code is 1."
    )
    example: ClassVar[str] = (
        "qwenforge optimize model.onnx -o fused.onnx --target ort-cpu --verify\n"
        "qwenforge optimize model.onnx -o fused.onnx --target tensorrt --device h200 --max-length 2048\n"
        "qwenforge optimize model.onnx -o fused.onnx --target ort-cuda --attention plugin\n"
        "qwenforge optimize model.onnx -o fused.onnx --disable swiglu --json"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", metavar="IN.onnx", type=Path, help="the model to rewrite; it is not changed")
        parser.add_argument("-o", "--output", metavar="OUT.onnx", type=Path, required=True, help="where to write it")
        add_target(parser, default="portable")
        parser.add_argument(
            "--max-length",
            metavar="N",
            type=positive_int,
            help="longest context: rows of the rotary tables (default: 32768) and, for TensorRT, size of the caches "
            "(default: 4096)",
        )
        parser.add_argument("--verify", action="store_true", help="compare the outputs before and after every rule")
        parser.add_argument(
            "--disable", metavar="RULE", action="append", default=[], help="leave out a rule (may be repeated)"
        )
        add_lowering_choice(parser, weights=False)
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        from qwenforge.exporter.external_data import save_model
        from qwenforge.graph_passes.lower.tensorrt_signature import TENSORRT_MAX_LENGTH, check_precision
        from qwenforge.graph_passes.pipeline import optimize
        from qwenforge.tensorrt_choice import TensorRTChoice

        _refuse_output(args.model, args.output)
        choice = lowering_choice(args)
        model = _load(args.model)
        result = optimize(
            model,
            target=args.target,
            verify=args.verify,
            disable=args.disable,
            positions=args.max_length,
            choice=choice,
            capacity=(args.max_length or TENSORRT_MAX_LENGTH) if isinstance(choice, TensorRTChoice) else None,
        )
        if choice is not None:
            check_precision(result.model)
        skipped = result.skipped
        save_model(result.model, args.output)
        _print(args, result, skipped)
        return EXIT_USER_ERROR if result.refused else EXIT_DONE


def _refuse_output(source: Path, output: Path) -> None:
    if output.is_dir():
        raise UserError(f"{output} is a folder: name the ONNX file to write, such as {output / 'model.onnx'}.")
    if not output.parent.is_dir():
        raise UserError(f"the folder {output.parent} does not exist: create it first.")
    if source.resolve() == output.resolve():
        raise UserError(f"{output} is the input itself: choose another output file.")


def _load(path: Path) -> ir.Model:
    import google.protobuf.message
    import onnx_ir as ir

    if not path.is_file():
        raise UserError(f"{path} is not a file: give the ONNX model to rewrite.")
    try:
        model = ir.load(path)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                _check_external(value.const_value, path)
    except (google.protobuf.message.DecodeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise GraphError(f"{path} is not a readable ONNX model ({error}): export it again.") from error
    if not model.graph.outputs:
        raise GraphError(f"{path} has no graph outputs: it is not a complete ONNX model.")
    return model


def _check_external(tensor: ir.ExternalTensor, model: Path) -> None:
    data = Path(tensor.path)
    if not data.is_file():
        raise UserError(f"{model} keeps weights in {data}, which is missing: put the file beside the model.")
    end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if data.stat().st_size < end:
        raise UserError(f"{data} ends before byte {end}, where weight '{tensor.name}' does: copy the file again.")


def _print(args: argparse.Namespace, result: PipelineResult, skipped: tuple[Skipped, ...]) -> None:
    from qwenforge.graph_passes import report

    if args.json:
        import json

        head = {"input": str(args.model), "output": str(args.output), "target": args.target, "verified": args.verify}
        print(json.dumps(head | report.as_json(result, skipped=skipped), indent=2))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, 110)  # figures are not folded in a pipe
    console.print(report.as_table(result))
    for line in report.notes(result, skipped=skipped):
        console.print(line, style="red" if line.startswith("REFUSED") else None, markup=False)
    before = result.steps[0].nodes_before if result.steps else result.model.graph.num_nodes()
    console.print(f"{before} nodes -> {result.model.graph.num_nodes()} nodes, written to {args.output}", markup=False)
    if result.refused:
        names = ", ".join(step.rule for step in result.refused)
        console.print(f"warning: written without the rewrites of refused rules: {names}", style="red", markup=False)
