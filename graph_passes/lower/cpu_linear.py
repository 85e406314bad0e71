"""``MatMulNBits`` and the bias behind it -> ``qwenforge.cpu::QuantizedLinear``."""

from __future__ import annotations

from typing import Any, ClassVar

import onnx_ir as ir

from qwenforge.graph_passes.infra import (
    FusionPass,
    int_attribute,
    other_operand,
    replace_node,
    single_consumer,
    static_dim,
    weight,
)
from qwenforge.graph_passes.lower.cpu_ops import BIAS, LINEAR, MICROSOFT, is_supported, make, matrix


class UseQuantizedLinear(FusionPass):
    """Replace every product by a quantized matrix that is left."""

    name: ClassVar[str] = "cpu_linear"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.op_type != "MatMulNBits" or node.domain != MICROSOFT:
                continue
            if not is_supported(node) or node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.FLOAT:
                self.fail("our kernels have no such product", node)
                continue
            bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
            addition = single_consumer(node.outputs[0]) if bias is None else None
            added = _bias(addition, node) if addition is not None else None
            attributes: dict[str, Any] = {key: int_attribute(node, key, 0) for key in ("K", "N", "bits", "block_size")}
            inputs = [node.inputs[0], *matrix(node), added if added is not None else bias]
            linear = make(model, LINEAR, inputs, attributes, node.name, self.name)
            if addition is not None and added is not None:
                # The result takes the sum's place; nobody reads the product itself any more.
                model.graph.insert_before(node, linear)
                result, total = linear.outputs[0], addition.outputs[0]
                result.shape, result.type = total.shape, total.type
                result.name, total.name = total.name, None
                total.replace_all_uses_with(result, replace_graph_outputs=True)
                model.graph.remove([addition, node], safe=True)
            else:
                replace_node(model, node, [linear], linear.outputs)
            self.matches += 1


def _bias(addition: ir.Node, product: ir.Node) -> ir.Value | None:
    """The bias that ``addition`` adds to the product; None where it adds anything else."""
    if addition.op_type != "Add" or addition.domain:
        return None
    other = other_operand(addition, product.outputs[0])
    if weight(other) is None or other is None or other.shape is None or len(other.shape) != 1:
        return None
    return other if static_dim(other, 0) == int_attribute(product, "N", 0) else None
