"""The shared expert of a layer, found by structure: sigmoid(gate) * SwiGLU(x), added to the experts of the same x."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qwenforge.graph_passes.infra import int_attribute, is_op, other_operand, scalar, single_consumer, static_dim


@dataclass(frozen=True)
class Rounding:
    """What a QuantizeLinear and a DequantizeLinear round a value to: codes of ``dtype`` times ``scale``."""

    dtype: ir.DataType
    scale: float


@dataclass(frozen=True)
class SharedExpert:
    """The shared expert of a layer and where its result is added to the routed experts'.

    Attributes:
        gate_up: the merged product's weight, [C, 2 Is].
        down: [Is, C].
        gate_logits: [T, 1], before the sigmoid.
        addition: the node that adds it to the routed experts.
        tokens: how its tokens are rounded; None where they are not.
        hidden: how its activated channels are.
    """

    gate_up: ir.TensorProtocol
    down: ir.TensorProtocol
    gate_logits: ir.Value
    addition: ir.Node
    tokens: Rounding | None = None
    hidden: Rounding | None = None


def find_shared_expert(experts: ir.Node) -> SharedExpert | None:
    """The shared expert added to ``experts``: sigmoid(gate) * SwiGLU(x) over the very same x; None if there is none."""
    routed = experts.outputs[0]
    addition = single_consumer(routed)
    if addition is None or addition.op_type != "Add" or addition.domain:
        return None
    weighted = is_op(other_operand(addition, routed), "Mul")
    if weighted is None or single_consumer(weighted.outputs[0]) is not addition:
        return None
    for gate_value, value in (weighted.inputs, list(reversed(weighted.inputs))):
        sigmoid, product = is_op(gate_value, "Sigmoid"), is_op(value, "MatMul")
        if sigmoid is None or product is None or gate_value is None or sigmoid.inputs[0] is None:
            continue
        if static_dim(gate_value, -1) != 1 or product.inputs[1] is None or product.inputs[1].const_value is None:
            continue
        hidden, of_hidden = _before_rounding(product.inputs[0])
        merged = _swiglu_product(hidden)
        if merged is None or merged.inputs[1] is None or merged.inputs[1].const_value is None:
            continue
        tokens, of_tokens = _before_rounding(merged.inputs[0])
        if tokens is experts.inputs[0]:
            down, gate_up = product.inputs[1].const_value, merged.inputs[1].const_value
            return SharedExpert(gate_up, down, sigmoid.inputs[0], addition, of_tokens, of_hidden)
    return None


def _before_rounding(value: ir.Value | None) -> tuple[ir.Value | None, Rounding | None]:
    """What ``value`` is rounded from, and how; ``value`` itself where it is not."""
    dequantize = is_op(value, "DequantizeLinear")
    quantize = is_op(dequantize.inputs[0], "QuantizeLinear") if dequantize is not None else None
    scale = scalar(quantize.inputs[1]) if quantize is not None else None
    if quantize is None or scale is None or quantize.outputs[0].dtype is None:
        return value, None
    return quantize.inputs[0], Rounding(quantize.outputs[0].dtype, scale)


def _swiglu_product(value: ir.Value | None) -> ir.Node | None:
    """The merged product behind ``value`` = Swish(its first half) * its second half; None if it is anything else."""
    gated = is_op(value, "Mul")
    if gated is None:
        return None
    for activated, up in (gated.inputs, list(reversed(gated.inputs))):
        swish = is_op(activated, "Swish")
        gate = swish.inputs[0] if swish is not None and "alpha" not in swish.attributes else None
        split = is_op(gate, "Split")
        if split is None or up is None or list(split.outputs) != [gate, up]:
            continue
        if split.inputs[0] is None or len(split.inputs) > 1 or int_attribute(split, "axis", 0) not in (-1, 1):
            continue
        product = is_op(split.inputs[0], "MatMul")
        if product is not None:
            return product
    return None
