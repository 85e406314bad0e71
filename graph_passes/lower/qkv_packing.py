"""One projection for q, k and v: three MatMuls of the same tensor -> one by [Wq | Wk | Wv], read as packed QKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.quantized_weights import as_quantized
from qwenforge.graph_passes.infra import FusionPass, add_initializer, is_op, static_dim, tag


@dataclass(frozen=True)
class Projection:
    """``output = x @ weight (+ bias)``."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value


class PackQKV(FusionPass):
    """Merge the projections in front of every ``com.microsoft::GroupQueryAttention`` that rotates q and k itself.

    Another operator that takes packed QKV as its first input, and nothing for the next two then, is a subclass.
    """

    name: ClassVar[str] = "pack_qkv"
    operator: ClassVar[tuple[str, str]] = ("com.microsoft", "GroupQueryAttention")

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if (node.domain, node.op_type) != self.operator or node.inputs[1] is None:
                continue
            parts = [_projection(value) for value in node.inputs[:3]]
            if any(part is None for part in parts):
                self.fail("q, k or v is not a projection alone (a norm or a rotation is between)", node)
                continue
            projections = [part for part in parts if part is not None]
            if len({part.x for part in projections}) != 1 or len({part.bias is None for part in projections}) != 1:
                self.fail("q, k and v project different tensors, or only some have a bias", node)
                continue
            if len({_format(part.weight) for part in projections}) != 1:
                self.fail("q, k and v are quantized differently", node)
                continue
            if any(len(part.output.uses()) != 1 for part in projections):
                self.fail("a projection has another use", node)
                continue
            self._rewrite(model, node, projections)

    def _rewrite(self, model: ir.Model, attention: ir.Node, parts: list[Projection]) -> None:
        scope = (attention.name or "").removesuffix("attention")
        tensors = [part.weight.const_value for part in parts]
        weight = add_initializer(
            model, f"{scope}qkv_proj.weight", weights.concat([tensor for tensor in tensors if tensor is not None], 1)
        )
        product = tag(ir.node("MatMul", [parts[0].x, weight], name=f"{scope}qkv_proj"), self.name)
        nodes = [product]
        biases = [part.bias.const_value for part in parts if part.bias is not None]
        if biases:
            merged = weights.concat([tensor for tensor in biases if tensor is not None], 0)
            bias = add_initializer(model, f"{scope}qkv_proj.bias", merged)
            nodes.append(tag(ir.node("Add", [product.outputs[0], bias], name=f"{scope}qkv_proj.add"), self.name))
        width = sum(static_dim(part.weight, 1) or 0 for part in parts)
        lead = parts[0].output.shape
        for node in nodes:
            node.outputs[0].name = f"{node.name}.output"
            node.outputs[0].type = parts[0].output.type
            node.outputs[0].shape = ir.Shape([*lead[:-1], width]) if lead is not None else None
        model.graph.insert_before(attention, nodes)
        attention.replace_input_with(0, nodes[-1].outputs[0])
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
        self.packed(attention)
        self.matches += 1

    def packed(self, attention: ir.Node) -> None:
        """Tell ``attention`` that its QKV is packed, where the missing inputs do not say it."""


def _format(matrix: ir.Value) -> tuple[str, int, bool] | None:
    """How ``matrix`` [K, N] is quantized: joined to one of another kind it could not be stored as codes."""
    assert matrix.const_value is not None
    found = as_quantized(weights.transpose(matrix.const_value, (1, 0)))
    return (found.format, found.group_size, found.zero_points is None) if found is not None else None


def _projection(value: ir.Value | None) -> Projection | None:
    added = is_op(value, "Add")
    product, bias = is_op(value, "MatMul"), None
    if added is not None:
        for operand, other in (added.inputs, list(reversed(added.inputs))):
            if other is not None and other.const_value is not None and len(other.const_value.shape) == 1:
                product, bias = is_op(operand, "MatMul"), other
    if value is None or product is None or product.inputs[0] is None or product.inputs[1] is None:
        return None
    weight = product.inputs[1]
    if weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    if bias is not None and static_dim(bias, 0) != static_dim(weight, 1):
        return None  # a bias of one element, broadcast
    return Projection(product.inputs[0], weight, bias, value)
