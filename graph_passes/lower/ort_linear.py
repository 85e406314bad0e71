"""Matrix products by weights as the checkpoint stores them, [out, in] -> ``com.microsoft::FusedMatMul`` with transB.

Used for every matrix when weights are linked (their bytes then stay the checkpoint's), and for a vocabulary projection
tied to the embedding, which would otherwise be stored a second time, transposed.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.graph_passes.infra import FusionPass, add_initializer, replace_node, tag


class MatMulByStoredWeight(FusionPass):
    """Take the transpose out of every weight that is one, into the product."""

    name: ClassVar[str] = "stored_weight"

    def run(self, model: ir.Model) -> None:
        stored: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            weight = node.inputs[1] if node.op_type == "MatMul" and not node.domain else None
            if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
                continue
            if weight not in stored:
                source = weights.transpose(weight.const_value, [1, 0])
                if isinstance(source, weights.DerivedTensor):
                    self.fail("the weight is not stored transposed", node)
                    continue
                stored[weight] = _held(model, source) or add_initializer(model, f"{weight.name}.stored", source)
            multiply_transposed(model, node, stored[weight], self.name)
            self.matches += 1


class TiedVocabularyProjection(FusionPass):
    """Project onto the vocabulary by the embedding table itself where the two are one tensor."""

    name: ClassVar[str] = "tied_vocabulary"

    def run(self, model: ir.Model) -> None:
        for node, table in tied_projections(model):
            multiply_transposed(model, node, table, self.name)
            self.matches += 1


def tied_projections(model: ir.Model) -> list[tuple[ir.Node, ir.Value]]:
    """Each product by the transpose of an embedding table, with the table."""
    tables: dict[Hashable, ir.Value] = {}
    for node in model.graph:
        if node.op_type == "Gather" and not node.domain and node.inputs[0] is not None:
            table = node.inputs[0]
            if table.const_value is not None and len(table.const_value.shape) == 2:
                tables[weights.plan_key(table.const_value)] = table
    found = []
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" and not node.domain else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        tied = tables.get(weights.plan_key(weights.transpose(weight.const_value, [1, 0])))
        if tied is not None:
            found.append((node, tied))
    return found


def _held(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value | None:
    """The initializer that already holds these bytes, if any."""
    key = weights.plan_key(tensor)
    for value in model.graph.initializers.values():
        held = value.const_value
        if held is not None and len(held.shape) == 2 and weights.plan_key(held) == key:
            return value
    return None


def multiply_transposed(model: ir.Model, node: ir.Node, weight: ir.Value, rule: str) -> None:
    """Replace ``node`` (x @ w) by x @ weight^T."""
    fused = ir.node("FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain="com.microsoft", name=node.name)
    replace_node(model, node, [tag(fused, rule)], fused.outputs)
    model.graph.opset_imports["com.microsoft"] = 1
