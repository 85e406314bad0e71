"""Arguments that several verbs share, so that they read and behave the same everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qwenforge import targets
from qwenforge.devices import DEVICES

if TYPE_CHECKING:
    from qwenforge.tensorrt_choice import TensorRTChoice


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """``BUNDLE``: the folder that ``qwenforge export`` wrote (``args.bundle``, a Path)."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder written by 'qwenforge export'")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: one JSON object on stdout and nothing else there (``args.json``, a bool)."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_target(parser: argparse.ArgumentParser, *, default: str) -> None:
    """``--target``: where the graph is to run (``args.target``, a str; an unbuilt one is refused by name later)."""
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


def add_tensorrt_choice(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """The options that choose a TensorRT lowering; ``weights``: with ``--weights-as``."""
    group = parser.add_argument_group("TensorRT targets")
    group.add_argument("--device", metavar="D", help=f"what the engine runs on: {', '.join(DEVICES)}")
    group.add_argument("--tensorrt", metavar="V", help="TensorRT version, such as 10.3 (default: the device's newest)")
    group.add_argument(
        "--attention",
        choices=("native", "plugin"),
        help="by TensorRT's own layers (default from TensorRT 11 on) or our plugin (default before)",
    )
    group.add_argument(
        "--experts",
        choices=("plugin", "native"),
        help="by our plugin (default) or TensorRT's own layer (TensorRT 11 on SM 100, 103, 110)",
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


def tensorrt_choice(args: argparse.Namespace) -> TensorRTChoice | None:
    """The lowering that these arguments ask for; None when the target is not TensorRT.

    Raises:
        UserError: they do not go together, or the device cannot do it.
    """
    from qwenforge.tensorrt_choice import choose

    return choose(
        args.target,
        device=args.device,
        version=args.tensorrt,
        attention=args.attention,
        experts=args.experts,
        weights_as=args.weights_as,
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
