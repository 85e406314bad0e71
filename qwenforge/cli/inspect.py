"""``qwenforge inspect``: what is in a bundle or an ONNX model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenforge.cli.arguments import add_json
from qwenforge.cli.base import EXIT_DONE, Command
from qwenforge.cli.pages import write_page

if TYPE_CHECKING:
    from qwenforge.bundle import Bundle
    from qwenforge.engine.inspection import Inspection
    from qwenforge.engine.layer_drawing import DrawnNode
    from qwenforge.engine.tensorrt.inspection import EngineInspection


class InspectCommand(Command):
    """Report on a bundle or an ONNX model without loading its weights."""

    name = "inspect"
    help = "show what is in a bundle, an ONNX model or an engine"
    description = (
        "Show which operators a model consists of, what is fused, parameters and bytes by kind, and every layer. Works "
        "on any ONNX model; of a bundle it also checks the files and shows the manifest. Weights are not loaded. Of a "
        "TensorRT engine it shows what it was built for and, on a GPU that can load it, TensorRT's own layers."
    )
    example = (
        "qwenforge inspect ./tiny-bundle --html tiny.html\nqwenforge inspect ./tiny-rtx/engine.0123456789ab.plan --json"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare MODEL, --verify, --html and --json."""
        parser.add_argument(
            "model",
            metavar="BUNDLE|MODEL.onnx|ENGINE",
            type=Path,
            help="a bundle folder, an ONNX file or an engine (*.plan)",
        )
        parser.add_argument(
            "--verify",
            choices=("quick", "full"),
            default="quick",
            help="how to check a bundle: hashes of small files and of samples of large ones (default), or every byte",
        )
        parser.add_argument("--html", metavar="F", type=Path, help="also write one self-contained page, with pictures")
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print the report; UserError when the model or bundle cannot be read or the page cannot be written."""
        from qwenforge.engine.inspection import inspect_model, read_model
        from qwenforge.engine.layer_recognition import recognize_layers

        if args.model.suffix in (".plan", ".engine"):
            return _inspect_engine(args)
        bundle = _open_bundle(args.model, args.verify)
        model = read_model(bundle.model_path if bundle is not None else args.model)
        layers = recognize_layers(model.graph)
        report = inspect_model(model, args.model.resolve().name, layers)
        if args.html is not None:
            from qwenforge.engine.inspection_html import render_page

            manifest = bundle.manifest if bundle is not None else None
            write_page(args.html, render_page(report, layers, manifest=manifest, before=_layer_before(bundle)))
        if args.json:
            print(json.dumps(_as_json(report, bundle), indent=1))
        else:
            _print_text(report, bundle, args)
        return EXIT_DONE


def _inspect_engine(args: argparse.Namespace) -> int:
    from qwenforge.engine.tensorrt.inspection import inspect_engine
    from qwenforge.errors import UserError

    if args.html is not None:
        raise UserError("--html draws graphs, and an engine has none; give the bundle's folder.")
    report = inspect_engine(args.model)
    if args.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        _print_engine(report)
    return EXIT_DONE


def _print_engine(report: EngineInspection) -> None:
    from rich.console import Console

    from qwenforge.engine.bundle_summary import summarize_engine
    from qwenforge.engine.units import size

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{report.path.name}: {size(report.bytes)}", markup=False)
    if report.record is not None:
        for name, value in summarize_engine(report.record):
            console.print(f"  {name:<20} {value}", markup=False)
    if report.network is not None:
        operators = ", ".join(f"{item.count} {item.operator}" for item in report.network.operators)
        console.print(f"built from {report.network.nodes} nodes: {operators}", markup=False)
    for layer in report.layers or []:
        console.print(
            layer if isinstance(layer, str) else f"{layer.get('LayerType')}: {layer.get('Name')}", markup=False
        )
    for sentence in report.unknown:
        console.print(f"not known: {sentence}", markup=False)


def _open_bundle(path: Path, verify: Any) -> Bundle | None:
    from qwenforge.bundle import Bundle
    from qwenforge.errors import BundleError

    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name too long, a folder that may not be entered
        reason = f"cannot be reached ({error.strerror})"
        raise BundleError(f"{str(path)[:200]} {reason}; give a bundle folder or an ONNX file") from error
    if is_folder:
        return Bundle.open(path, verify=verify)
    if not exists:
        raise BundleError(f"{path} does not exist; give a bundle folder or an ONNX file")
    return None


def _layer_before(bundle: Bundle | None) -> list[DrawnNode]:
    from qwenforge.engine.layer_drawing import nodes_of_record
    from qwenforge.manifest import LAYER_BEFORE

    if bundle is None or LAYER_BEFORE not in bundle.manifest.files:
        return []
    return nodes_of_record(bundle.read_json(LAYER_BEFORE))


def _as_json(report: Inspection, bundle: Bundle | None) -> dict[str, Any]:
    result = report.to_json()
    if bundle is not None:
        manifest = bundle.manifest.model_dump(mode="json")
        result["verification"] = manifest["verification"]
        result["manifest"] = manifest
    return result


def _print_text(report: Inspection, bundle: Bundle | None, args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from qwenforge.engine.bundle_summary import summarize_bundle
    from qwenforge.engine.units import quantity, size, thousands

    console = Console(highlight=False)

    def show(title: str, columns: list[str], rows: list[list[str]], numbers: set[str]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right" if column in numbers else "left")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)

    opsets = ", ".join(f"{domain} {version}" for domain, version in report.opsets.items())
    console.print(
        f"[bold]{escape(report.name)}[/]: {quantity(report.parameters)} parameters, {size(report.bytes)}; {opsets}"
    )
    outside = f", {report.nodes_outside_layers} outside the layers" if report.layers else "; no layers recognized"
    console.print(f"{report.nodes} nodes, {len(report.layers)} layers{outside}")
    if bundle is not None:
        console.print(f"files checked ({args.verify}): whole")
        rows = [[title, name, value] for title, group in summarize_bundle(bundle.manifest) for name, value in group]
        show("Bundle", ["part", "", "value"], rows, set())
    show(
        "What is fused",
        ["group", "operators"],
        [[group, str(count)] for group, count in report.fused.items() if count],
        {"operators"},
    )
    for name, count in report.functions.items():
        console.print(f"function {escape(name)}: {count} nodes")
    for sentence in report.not_fused:
        console.print(f"[yellow]not fused:[/] {escape(sentence)}")
    show(
        "Parameters and bytes",
        ["kind", "type", "tensors", "parameters", "bytes"],
        [[g.kind, g.dtype, str(g.tensors), thousands(g.parameters), size(g.bytes)] for g in report.weights],
        {"tensors", "parameters", "bytes"},
    )
    if report.layers:
        show(
            f"Layers (recognized by {report.layers_from})",
            ["layer", "nodes", "attention", "feed-forward", "parameters", "bytes"],
            [
                [str(r.index), str(r.nodes), r.attention, r.feed_forward, thousands(r.parameters), size(r.bytes)]
                for r in report.layers
            ],
            {"layer", "nodes", "parameters", "bytes"},
        )
    show(
        "Operators",
        ["domain", "operator", "count"],
        [[item.domain, item.operator, str(item.count)] for item in report.operators],
        {"count"},
    )
    if args.html is not None:
        console.print(f"page written to {escape(str(args.html))}")
