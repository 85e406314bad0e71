"""A stage imports only itself, the stages before it and the root package, at the top of a file and inside functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from support.source_tree import ROOT, STAGES, python_files

# The facade hands out what the stages make, and the command line puts the stages together.
_MAY_IMPORT_EVERYTHING = ("qwenforge", "qwenforge.cli", "qwenforge.__main__")


def _stage(module: str) -> str | None:
    """The stage that ``module`` belongs to, ``cli``, or None for the root package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in (*STAGES, "cli") else None


def _imported(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """Imports in ``source`` that ``module`` is too early in the pipeline to make."""
    own = _stage(module)
    if own == "cli" or module in _MAY_IMPORT_EVERYTHING:
        return []
    allowed = () if own is None else STAGES[: STAGES.index(own) + 1]
    return [
        f"{module}, line {line}: imports {name}"
        for line, name in _imported(source)
        if name.split(".")[0] == "qwenforge" and _stage(name) is not None and _stage(name) not in allowed
    ]


def test_no_module_imports_a_later_stage() -> None:
    found = [text for module, path in python_files() for text in violations(module, path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from qwenforge.runtime.session import Session",
        "import qwenforge.runtime",
        "from qwenforge import runtime",
        "def late():\n    from qwenforge.runtime import load",
        "if TYPE_CHECKING:\n    from qwenforge.cli.base import Command",
    ],
)
def test_import_of_a_later_stage_is_found(source: str) -> None:
    assert violations("qwenforge.engine.export", source)
    assert violations("qwenforge.targets", source)


def test_import_of_an_earlier_stage_is_allowed() -> None:
    source = "from qwenforge.exporter.weights import cast\nfrom qwenforge import names\nimport torch"
    assert violations("qwenforge.engine.export", source) == []


@pytest.mark.parametrize("stage", STAGES)
def test_linter_bans_every_later_stage(stage: str) -> None:
    banned = re.findall(r'^"(qwenforge\.\w+)"\.msg', (ROOT / stage / "ruff.toml").read_text(), re.MULTILINE)
    later = STAGES[STAGES.index(stage) + 1 :]
    assert banned == [f"qwenforge.{name}" for name in (*later, "cli")]
