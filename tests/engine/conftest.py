"""Exports shared by the engine's tests: each traced once in a run, verified as an export verifies itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qwenforge.engine import export as export_module
from qwenforge.engine.export import ExportReport, export_checkpoint
from qwenforge.engine.threads import single_threaded_torch
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.trace import TracedModel, trace
from support.checkpoints import Kind, make_checkpoint


@dataclass(frozen=True)
class Export:
    """A tiny checkpoint, its bundle and what the export said."""

    checkpoint: Checkpoint
    bundle: Path
    report: ExportReport

    @property
    def model(self) -> Path:
        """The bundle's graph."""
        return self.bundle / "model.onnx"


Exports = Callable[[str, str, str], Export]
CHECKPOINTS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "mixed": ("qwen2_moe", {"mlp_only_layers": [0]}),
}
"""Dense, sparse, and one layer of each."""


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """``exports(name, target, dtype)``: a bundle, not to be changed, of one of ``CHECKPOINTS``."""
    folder = tmp_path_factory.mktemp("exports")
    made: dict[tuple[str, str, str], Export] = {}

    def export(name: str, target: str, dtype: str) -> Export:
        key = name, target, dtype
        if key not in made:
            kind, config = CHECKPOINTS[name]
            if not (folder / name).exists():
                make_checkpoint(folder / name, kind, **config)
            report = export_checkpoint(folder / name, folder / "-".join(key), target=target, dtype=dtype)
            made[key] = Export(Checkpoint.open(folder / name), report.bundle, report)
        return made[key]

    return export


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Every model here is tiny."""
    with single_threaded_torch():
        yield


_TRACED: dict[tuple[Path, ir.DataType], TracedModel] = {}


@pytest.fixture(autouse=True)
def each_checkpoint_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes most of a tiny export's time, and the passes work on a copy of what it gives."""

    def traced_before(checkpoint: Checkpoint, dtype: ir.DataType) -> TracedModel:
        key = checkpoint.folder, dtype
        if key not in _TRACED:
            _TRACED[key] = trace(checkpoint, dtype)
        return _TRACED[key]

    monkeypatch.setattr(export_module, "trace", traced_before)
