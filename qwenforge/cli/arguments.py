"""Arguments that several verbs share, so that they read and behave the same everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qwenforge import targets
from qwenforge.devices import DEVICES

if TYPE_CHECKING:
    from qwenforge.lowering_choice import LoweringChoice


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """``BUNDLE``: the folder that ``qwenforge export`` wrote (``args.bundle``, a Path)."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder written by 'qwenforge export'")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: one JSON object on stdout and nothing else there (``args.json``, a bool)."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_target(parser: argparse.ArgumentParser, *, default: str) -> None:
    """``--target``: where the graph is to run (``args.target``, a str; an unknown one is refused by name later)."""
    known = ", ".join(targets.available())
    parser.add_argument(
        "--target", default=default, metavar="TARGET", help=f"where the graph runs: {known} (default: {default})"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """``--dtype``: precision of weights and activations (``args.dtype``, a str or None)."""
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help=f"precision of weights and activations: {', '.join(targets.DTYPES)} (default: the target's best)",
    )


def add_lowering_choice(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """The options that choose a lowering for a GPU; ``weights``: with ``--weights-as``."""
    group = parser.add_argument_group("targets tensorrt, tensorrt-rtx and ort-cuda")
    group.add_argument(
        "--device",
        metavar="D",
        help=f"what the engine runs on: {', '.join(DEVICES)} (ort-cuda: whose preferences to follow; any GPU runs it)",
    )
    group.add_argument("--tensorrt", metavar="V", help="TensorRT version, such as 10.3 (default: the device's newest)")
    group.add_argument(
        "--attention",
        choices=("native", "plugin"),
        help="by the engine's own operators (default for ort-cuda, and from TensorRT 11 on) or by our plugin (default "
        "before)",
    )
    group.add_argument(
        "--experts",
        choices=("plugin", "native"),
        help="by our plugin (default) or the engine's own operator (ort-cuda; TensorRT 11 on SM 100, 103, 110)",
    )
    if not weights:
        parser.set_defaults(weights_as=None)
        return
    group.add_argument(
        "--weights-as",
        choices=("constants", "inputs"),
        help="weight matrices inside the engine (default), or bound to it as inputs: an engine of megabytes beside "
        "weights.safetensors",
    )


def lowering_choice(args: argparse.Namespace) -> LoweringChoice | None:
    """The lowering that these arguments ask for; None when the target has nothing to choose.

    Raises:
        UserError: they do not go together, or the device cannot do it.
    """
    from qwenforge.lowering_choice import choose

    return choose(
        args.target,
        device=args.device,
        version=args.tensorrt,
        attention=args.attention,
        experts=args.experts,
        weights_as=args.weights_as,
    )


def add_plugin_library(parser: argparse.ArgumentParser) -> None:
    """``--plugin-library``: our custom ops for ONNX Runtime (``args.plugin_library``, a Path or None)."""
    parser.add_argument(
        "--plugin-library",
        type=Path,
        metavar="FILE",
        help="our ops, for bundles that have them: libqwenforge_cpu.so for ort-cpu (default: QWENFORGE_CPU_LIBRARY, or "
        "the installed one), libqwenforge_ort.so for ort-cuda (QWENFORGE_ORT_LIBRARY, or what 'make plugins' built)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """``--threads``: CPU threads of the engine (``args.threads``, a positive int or None for all cores)."""
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: all physical cores)")


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


positive_int.__name__ = "positive integer"
"""argparse names the type in 'invalid positive integer value'."""
