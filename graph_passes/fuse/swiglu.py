"""SwiGLU with one merged projection: ``silu(x Wg) * (x Wu)`` -> ``MatMul`` by [Wg | Wu], ``Split``, ``Swish``, ``Mul``.

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.graph_passes import infra
from qwenforge.graph_passes.infra import (
    FusionPass,
    add_initializer,
    consumers,
    is_op,
    other_operand,
    single_consumer,
    tag,
)

_OTHER_ACTIVATIONS = ("Gelu", "Relu", "Tanh", "HardSwish", "Mish")


@dataclass(frozen=True)
class GatedUnit:
    """One matched unit: ``product = silu(gate) * up`` with gate and up projections of the same x."""

    product: ir.Node
    gate: ir.Node
    up: ir.Node


class FuseSwiGLU(FusionPass):
    """Merge the gate and up projections of every SwiGLU, dense or shared expert."""

    name: ClassVar[str] = "swiglu"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.domain:
                continue
            if node.op_type in _OTHER_ACTIVATIONS and _is_gated_unit(node.outputs[0]):
                self.fail(f"gated by {node.op_type}, not Swish", node)
            elif node.op_type in ("Sigmoid", "Swish"):
                unit = self._match(node)
                if unit is not None:
                    self._rewrite(model, unit)

    def _match(self, activation: ir.Node) -> GatedUnit | None:
        gate_value = activation.inputs[0]
        if activation.op_type == "Sigmoid":
            silu = single_consumer(activation.outputs[0])
            if silu is None or silu.op_type != "Mul" or other_operand(silu, activation.outputs[0]) is not gate_value:
                self._explain(activation)
                return None
            activated = silu.outputs[0]
            readers = {activation, silu}
        else:
            if "alpha" in activation.attributes and activation.attributes["alpha"].as_float() != 1.0:
                self.fail("Swish with an alpha other than 1", activation)
                return None
            activated, readers = activation.outputs[0], {activation}
        product = single_consumer(activated)
        if product is None or product.op_type != "Mul":
            self.fail("the activated gate is not multiplied by one up projection", activation)
            return None
        up_value = other_operand(product, activated)
        split = is_op(gate_value, "Split")
        if split is not None and is_op(up_value, "Split") is split:
            return None  # merged already
        gate, up = is_op(gate_value, "MatMul"), is_op(up_value, "MatMul")
        if gate is None or up is None or gate_value is None or up_value is None:
            self.fail("gate and up are not both products with a weight", product)
            return None
        if gate.inputs[0] is not up.inputs[0]:
            self.fail("gate and up project different tensors", product)
            return None
        if not _is_matrix(gate.inputs[1]) or not _is_matrix(up.inputs[1]):
            self.fail("gate or up is not a product with a weight matrix", product)
            return None
        if _width(gate.inputs[1]) != _width(up.inputs[1]):
            self.fail("gate and up have different widths", product)
            return None
        if gate_value.is_graph_output() or set(consumers(gate_value)) != readers or single_consumer(up_value) is None:
            self.fail("the gate or up projection has another use", product)
            return None
        return GatedUnit(product, gate, up)

    def _explain(self, sigmoid: ir.Node) -> None:
        """Say what is wrong with a sigmoid that is not silu's, unless it just gates something, as a shared expert."""
        silu = next((user for user in consumers(sigmoid.outputs[0]) if user.op_type == "Mul"), None)
        if silu is None or not _is_gated_unit(silu.outputs[0]):
            return
        if other_operand(silu, sigmoid.outputs[0]) is sigmoid.inputs[0]:
            self.fail("the sigmoid of the gate has another use", sigmoid)
        else:
            self.fail("the sigmoid gates another tensor than its own input", sigmoid)

    def _rewrite(self, model: ir.Model, unit: GatedUnit) -> None:
        x, gate_weight, up_weight = unit.gate.inputs[0], unit.gate.inputs[1], unit.up.inputs[1]
        assert x is not None and gate_weight is not None and up_weight is not None
        assert gate_weight.const_value is not None and up_weight.const_value is not None
        scope = _scope(unit.gate, gate_weight.name or "")
        merged = weights.concat([gate_weight.const_value, up_weight.const_value], 1)
        weight = add_initializer(model, f"{scope}gate_up_proj.weight", merged)
        projection = ir.node("MatMul", [x, weight], name=f"{scope}gate_up_proj")
        halves = {"axis": -1, "num_outputs": 2}
        split = ir.node("Split", [projection.outputs[0]], halves, num_outputs=2, name=f"{scope}gate_up.split")
        swish = ir.node("Swish", [split.outputs[0]], name=f"{scope}act_fn")
        product = ir.node("Mul", [swish.outputs[0], split.outputs[1]], name=f"{scope}gated")
        old = unit.product.outputs[0]
        nodes = [projection, split, swish, product]
        for node in nodes:
            tag(node, self.name)
            for index, output in enumerate(node.outputs):
                output.name = f"{node.name}.{index}" if len(node.outputs) > 1 else f"{node.name}.output"
                output.shape, output.type = old.shape, old.type
        if old.shape is not None:
            projection.outputs[0].shape = ir.Shape([*old.shape[:-1], int(merged.shape.numpy()[1])])
        model.graph.insert_before(unit.product, nodes)
        new = product.outputs[0]
        new.name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.matches += 1


def _is_matrix(value: ir.Value | None) -> bool:
    tensor = infra.weight(value)
    return tensor is not None and len(tensor.shape) == 2


def _width(matrix: ir.Value | None) -> int:
    tensor = infra.weight(matrix)
    assert tensor is not None
    return int(tensor.shape.numpy()[1])


def _is_gated_unit(activated: ir.Value) -> bool:
    """Whether ``activated`` is multiplied by a product with a weight matrix."""
    product = single_consumer(activated)
    if product is None or product.op_type != "Mul":
        return False
    up = is_op(other_operand(product, activated), "MatMul")
    return up is not None and _is_matrix(up.inputs[1])


def _scope(gate: ir.Node, weight: str) -> str:
    """``model.layers.0.mlp.``, as told by the weight's name or by PyTorch's module scopes; else the weight's own."""
    for told in (weight, gate.metadata_props.get("pkg.torch.onnx.name_scopes", "")):
        found = re.search(r"(model\.layers\.\d+\.[\w.]*?)gate_proj\b", told)
        if found:
            return found[1]
    found = re.match(r"(.*\.|)gate_proj\.weight", weight)
    return found[1] if found else f"{weight}."
