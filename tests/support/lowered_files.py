"""Graphs lowered for TensorRT as files, without the rest of a bundle: one trace, many lowerings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.external_data import save_model
from qwenforge.exporter.instantiate import instantiate
from qwenforge.exporter.trace import trace
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.lower.tensorrt_signature import split_weight_inputs
from qwenforge.graph_passes.pipeline import optimize
from qwenforge.graph_passes.quantize.apply import apply_plan
from qwenforge.graph_passes.quantize.plan import QuantizationPlan
from qwenforge.tensorrt_choice import TensorRTChoice
from support.exported_models import no_weight_is_read


@dataclass(frozen=True)
class LoweredFile:
    """A lowered graph and its file; ``input_bytes``: of the weights that are inputs of the graph."""

    path: Path
    graph: ir.Model
    input_bytes: int

    @property
    def needs_plugins(self) -> bool:
        """Whether a node of the graph is one of our plugins."""
        return any(node.domain == "qwenforge" for node in self.graph.graph)


class Lowerings:
    """A checkpoint traced and fused once in ``dtype``, to be lowered in several ways with caches of ``capacity``."""

    def __init__(self, checkpoint: Path, dtype: ir.DataType, capacity: int) -> None:
        self._capacity = capacity
        self._source = Checkpoint.open(checkpoint)
        with no_weight_is_read():
            self._traced = trace(self._source, dtype)
            self._fused = optimize(self._traced.model, positions=capacity).model

    def write(
        self, folder: Path, choice: TensorRTChoice, *, weight_inputs: bool, plan: QuantizationPlan | None = None
    ) -> LoweredFile:
        """Write ``folder``/model.onnx, quantized by ``plan``; ``weight_inputs``: matrices are inputs, never read."""
        with no_weight_is_read():
            portable = instantiate(self._fused, self._traced, self._source)
            if plan is not None:
                apply_plan(portable, plan)
            final = lower(portable, choice.target, choice=choice, capacity=self._capacity)
            bound = split_weight_inputs(final) if weight_inputs else {}
        folder.mkdir(parents=True, exist_ok=True)
        save_model(final, folder / "model.onnx")
        return LoweredFile(folder / "model.onnx", final, sum(tensor.nbytes for tensor in bound.values()))
