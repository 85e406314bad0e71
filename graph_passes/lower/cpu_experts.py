"""Router, ``QMoE`` and the shared expert beside it -> ``qwenforge.cpu::QuantizedMixtureOfExperts``."""

from __future__ import annotations

from typing import Any, ClassVar

import onnx_ir as ir

from qwenforge.graph_passes.infra import (
    FusionPass,
    consumers,
    int_attribute,
    is_op,
    other_operand,
    replace_node,
    single_consumer,
    static_dim,
    weight,
)
from qwenforge.graph_passes.lower.cpu_gated_mlp import GatedMlp, find_gated_mlp
from qwenforge.graph_passes.lower.cpu_ops import MICROSOFT, MIXTURE_OF_EXPERTS, block_product, make

_GATE_UP, _DOWN = slice(2, 4), slice(5, 7)
_GATE_UP_ZERO_POINTS, _DOWN_ZERO_POINTS, _ROUTER_WEIGHTS = 11, 12, 14


class UseQuantizedMixtureOfExperts(FusionPass):
    """Replace every QMoE whose router is a product by one matrix."""

    name: ClassVar[str] = "cpu_experts"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.op_type != "QMoE" or node.domain != MICROSOFT:
                continue
            values = node.inputs[0]
            router = is_op(node.inputs[1], "MatMul")
            if values is None or values.dtype != ir.DataType.FLOAT:
                self.fail("it is not in fp32", node)
                continue
            if router is None or router.inputs[0] is not values or weight(router.inputs[1]) is None:
                self.fail("its logits are not a product of its tokens by a constant", node)
                continue
            if not _weights_are_probabilities(node):
                self.fail("its experts are not weighted by the softmax of its logits", node)
                continue
            self._replace(model, node, values, router)

    def _replace(self, model: ir.Model, node: ir.Node, values: ir.Value, router: ir.Node) -> None:
        gate_up, down = node.inputs[2], node.inputs[5]
        hidden, experts = static_dim(router.inputs[1], 0), static_dim(router.inputs[1], 1)
        rows = static_dim(gate_up, 1)
        if hidden is None or experts is None or rows is None:
            self.fail("the shapes of its weights are not known", node)
            return
        attributes: dict[str, Any] = {
            "hidden_size": hidden,
            "intermediate_size": rows // 2,
            "num_experts": experts,
            "k": int_attribute(node, "k", 1),
            "normalize_routing_weights": int_attribute(node, "normalize_routing_weights", 0),
            "bits": int_attribute(node, "expert_weight_bits", 4),
            "block_size": int_attribute(node, "block_size", 0),
            "down_bits": int_attribute(node, "fc2_expert_weight_bits", int_attribute(node, "expert_weight_bits", 4)),
            "down_block_size": int_attribute(node, "block_size", 0),
        }
        inputs = [
            *[values, router.inputs[1]],
            *[*node.inputs[_GATE_UP], _optional(node, _GATE_UP_ZERO_POINTS)],
            *[*node.inputs[_DOWN], _optional(node, _DOWN_ZERO_POINTS)],
        ]
        addition = single_consumer(node.outputs[0])
        shared = _shared_expert(node, addition, values) if addition is not None else None
        last = node
        if addition is not None and shared is not None:
            mlp, by = shared
            attributes |= {
                "shared_intermediate_size": int_attribute(mlp.gate, "N", 0),
                "shared_bits": int_attribute(mlp.gate, "bits", 0),
                "shared_block_size": int_attribute(mlp.gate, "block_size", 0),
                "shared_down_bits": int_attribute(mlp.down, "bits", 0),
                "shared_down_block_size": int_attribute(mlp.down, "block_size", 0),
            }
            inputs += [*mlp.weights, by]
            last = addition
        assert down is not None
        moe = make(model, MIXTURE_OF_EXPERTS, inputs, attributes, node.name, self.name)
        replace_node(model, last, [moe], moe.outputs)
        _skip_reshapes(moe)
        self.matches += 1


def _weights_are_probabilities(experts: ir.Node) -> bool:
    """Whether a chosen expert's weight is its probability, divided by the chosen ones' sum where it is normalized."""
    given = _optional(experts, _ROUTER_WEIGHTS)
    softmax = is_op(given, "Softmax")
    if given is None:
        return True
    normalized = int_attribute(experts, "normalize_routing_weights", 0) == 1
    return (
        softmax is not None
        and softmax.inputs[0] is experts.inputs[1]
        and int_attribute(softmax, "axis", -1) in (-1, 1)
        and not normalized
    )


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _shared_expert(experts: ir.Node, addition: ir.Node, values: ir.Value) -> tuple[GatedMlp, ir.Value] | None:
    """The shared expert that ``addition`` adds, and the weight of its sigmoid; None if it adds anything else."""
    if addition.op_type != "Add" or addition.domain:
        return None
    weighted = is_op(other_operand(addition, experts.outputs[0]), "Mul")
    if weighted is None or single_consumer(weighted.outputs[0]) is not addition:
        return None
    for gate, value in (weighted.inputs, list(reversed(weighted.inputs))):
        sigmoid, mlp = is_op(gate, "Sigmoid"), find_gated_mlp(block_product(value))
        product = is_op(sigmoid.inputs[0], "MatMul") if sigmoid is not None else None
        if product is None or mlp is None or mlp.values is not values or product.inputs[0] is not values:
            continue
        by = product.inputs[1]
        if by is not None and weight(by) is not None and static_dim(by, 1) == 1:
            return mlp, by
    return None


def _skip_reshapes(moe: ir.Node) -> None:
    """Take the tokens as they come and give them back like that: our op takes rows of any leading dimensions."""
    flat, result = moe.inputs[0], moe.outputs[0]
    before, after = is_op(flat, "Reshape"), single_consumer(result)
    if before is None or after is None or after.op_type != "Reshape" or after.domain:
        return
    source, target = before.inputs[0], after.outputs[0]
    if source is None or source.shape is None or target.shape is None or source.shape != target.shape:
        return
    moe.replace_input_with(0, source)
    result.shape, result.type = target.shape, target.type
    readers = consumers(target)
    target.replace_all_uses_with(result, replace_graph_outputs=True)
    assert all(target not in reader.inputs for reader in readers)
