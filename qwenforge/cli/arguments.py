"""Arguments that several verbs share, so that they read and behave the same everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwenforge import targets


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
        "--dtype", choices=targets.DTYPES, help="precision of weights and activations (default: the target's best)"
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
