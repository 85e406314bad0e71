"""Gate, up, SiLU and down by quantized matrices -> ``qwenforge.cpu::QuantizedGatedMlp``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from qwenforge.graph_passes.infra import (
    FusionPass,
    float_attribute,
    int_attribute,
    is_op,
    replace_node,
    single_consumer,
)
from qwenforge.graph_passes.lower.cpu_ops import GATED_MLP, MICROSOFT, block_product, make, matrix


@dataclass(frozen=True)
class GatedMlp:
    """The three products of ``values``; ``down`` makes the result."""

    values: ir.Value
    gate: ir.Node
    up: ir.Node
    down: ir.Node

    @property
    def weights(self) -> list[ir.Value | None]:
        """Codes, scales and zero points of gate, up and down."""
        return [*matrix(self.gate), *matrix(self.up), *matrix(self.down)]


def find_gated_mlp(down: ir.Node | None) -> GatedMlp | None:
    """The MLP that ends in the product ``down``; None where our kernels have none like it."""
    gated = is_op(down.inputs[0], "Mul") if down is not None else None
    if down is None or gated is None or single_consumer(gated.outputs[0]) is not down:
        return None
    for activated, value in (gated.inputs, list(reversed(gated.inputs))):
        silu, up = is_op(activated, "QuickGelu", MICROSOFT), block_product(value)
        gate = block_product(silu.inputs[0]) if silu is not None else None
        if silu is None or gate is None or up is None or float_attribute(silu, "alpha", 1.702) != 1.0:
            continue
        values = gate.inputs[0]
        if values is None or values is not up.inputs[0] or values.dtype != ir.DataType.FLOAT:
            continue
        inner = (silu.outputs[0], gate.outputs[0], up.outputs[0])
        same = all(int_attribute(gate, key, 0) == int_attribute(up, key, 0) for key in ("K", "N", "bits", "block_size"))
        square = int_attribute(down, "N", 0) == int_attribute(gate, "K", 0)
        if same and square and all(single_consumer(each) is not None for each in inner):
            return GatedMlp(values, gate, up, down)
    return None


class UseQuantizedGatedMlp(FusionPass):
    """Replace every MLP whose gate and up are products of their own."""

    name: ClassVar[str] = "cpu_gated_mlp"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            found = find_gated_mlp(block_product(node.outputs[0]))
            if found is None:
                continue
            attributes: dict[str, Any] = {
                "hidden_size": int_attribute(found.gate, "K", 0),
                "intermediate_size": int_attribute(found.gate, "N", 0),
                "bits": int_attribute(found.gate, "bits", 0),
                "block_size": int_attribute(found.gate, "block_size", 0),
                "down_bits": int_attribute(found.down, "bits", 0),
                "down_block_size": int_attribute(found.down, "block_size", 0),
            }
            mlp = make(model, GATED_MLP, [found.values, *found.weights], attributes, node.name, self.name)
            replace_node(model, node, [mlp], mlp.outputs)
            self.matches += 1
