"""The project's own files: which folder is which package, and every module in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("exporter", "graph_passes", "plugins", "calibration", "engine", "runtime", "bench")
"""The stages in pipeline order; each may import itself, those before it, and the root package."""


def python_files() -> Iterator[tuple[str, Path]]:
    """(dotted module name, file) of every module of the package, root package first."""
    for folder, package in (("qwenforge", "qwenforge"), *((stage, f"qwenforge.{stage}") for stage in STAGES)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def module_names() -> list[str]:
    """Names of every module of the package that may be imported."""
    return [name for name, _ in python_files() if not name.endswith("__main__")]
