"""RMS normalization as transformers writes it -> ``RMSNormalization`` (opset 23).

    y = weight * cast(x32 * rsqrt(mean(x32^2) + eps)),  x32 = cast(x, fp32)

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; transformers' Qwen2RMSNorm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qwenforge.graph_passes.infra import (
    FusionPass,
    int_attribute,
    integers,
    is_constant,
    is_op,
    other_operand,
    rank,
    scalar,
    static_dim,
    tag,
)

_LARGEST_EPSILON = 1e-2
_STASHED = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Types that a normalization may be computed in between its casts: RMSNormalization's stash_type is fp32."""


@dataclass(frozen=True)
class Norm:
    """One matched normalization: ``last`` computes it from ``x``."""

    last: ir.Node
    x: ir.Value
    weight: ir.Value
    epsilon: float


class FuseRMSNorm(FusionPass):
    """Fuse every normalization over the last axis, the per-head norms of queries and keys included."""

    name: ClassVar[str] = "rms_norm"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.domain or node.op_type != "ReduceMean":
                continue
            norm = self._match(node)
            if norm is not None:
                self._rewrite(model, norm)

    def _match(self, mean: ir.Node) -> Norm | None:
        """Match from the mean of squares, up to x and down to the product with the weight."""
        x32 = _squared(mean.inputs[0])
        if x32 is None:
            return None  # a mean of something else
        axes = integers(mean.inputs[1]) if len(mean.inputs) > 1 else None
        if axes is None or len(axes) != 1 or (axes[0] != -1 and axes[0] != (rank(x32) or 0) - 1):
            self.fail("the mean of squares is not over the last axis", mean)
            return None
        if int_attribute(mean, "keepdims", 1) != 1:
            self.fail("the mean of squares drops its axis", mean)
            return None
        added = _only(mean.outputs[0], "Add")
        epsilon = scalar(other_operand(added, mean.outputs[0])) if added is not None else None
        if added is None or epsilon is None or not 0.0 <= epsilon <= _LARGEST_EPSILON:
            self.fail("no small constant is added to the mean of squares", mean)
            return None
        scaled = _scaled_by_rsqrt(added.outputs[0], x32)
        if scaled is None:
            self.fail("x is not divided by the root of its mean square plus epsilon", added)
            return None
        return self._match_weight(scaled, x32, epsilon)

    def _match_weight(self, scaled: ir.Node, x32: ir.Value, epsilon: float) -> Norm | None:
        normalized, x = scaled.outputs[0], x32
        downcast = _only(normalized, "Cast")
        if downcast is not None:
            normalized, upcast = downcast.outputs[0], is_op(x32, "Cast")
            source = upcast.inputs[0] if upcast is not None else None
            if source is None or source.dtype != downcast.attributes["to"].as_int() or x32.dtype not in _STASHED:
                self.fail("the normalized tensor is cast to another type than x was cast from", downcast)
                return None
            x = source
        if _is_centered(x) or _is_centered(x32):
            self.fail("the mean is subtracted first: a layer normalization", scaled)
            return None
        product = _only(normalized, "Mul")
        weight = other_operand(product, normalized) if product is not None else None
        if product is None or weight is None:
            self.fail("the normalized tensor is not multiplied by a weight", scaled)
            return None
        size = static_dim(x32, -1)
        if weight.const_value is None or len(weight.const_value.shape) != 1 or weight.const_value.shape[0] != size:
            self.fail("the weight is not a vector over the last axis", product)
            return None
        if rank(product.outputs[0]) not in (None, rank(x32)):
            self.fail("a constant gives the result more dimensions than x has", product)
            return None
        return Norm(product, x, weight, epsilon)

    def _rewrite(self, model: ir.Model, norm: Norm) -> None:
        old = norm.last.outputs[0]
        name = (norm.weight.name or norm.last.name or "").removesuffix(".weight")
        attributes = {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1}
        node = tag(ir.node("RMSNormalization", [norm.x, norm.weight], attributes, name=name), self.name)
        new = node.outputs[0]
        new.shape, new.type = old.shape, old.type
        model.graph.insert_before(norm.last, node)
        new.name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.matches += 1


def _is_centered(value: ir.Value) -> bool:
    """Whether ``value`` is a tensor minus its mean."""
    difference = is_op(value, "Sub")
    mean = is_op(difference.inputs[1], "ReduceMean") if difference is not None else None
    return difference is not None and mean is not None and mean.inputs[0] is difference.inputs[0]


def _squared(value: ir.Value | None) -> ir.Value | None:
    power = is_op(value, "Pow")
    if power is not None:
        return power.inputs[0] if is_constant(power.inputs[1], 2.0, rtol=0) else None
    product = is_op(value, "Mul")
    return product.inputs[0] if product is not None and product.inputs[0] is product.inputs[1] else None


def _only(value: ir.Value, op_type: str) -> ir.Node | None:
    """The single consumer of ``value`` when it is an ``op_type``."""
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type and not users[0].domain else None


def _scaled_by_rsqrt(total: ir.Value, x32: ir.Value) -> ir.Node | None:
    """x32 * (1 / sqrt(total)), as Sqrt + Reciprocal + Mul, Sqrt + Div or Pow(-0.5) + Mul."""
    power = _only(total, "Pow")
    if power is not None and is_constant(power.inputs[1], -0.5, rtol=0):
        return _product_with(power.outputs[0], x32)
    root = _only(total, "Sqrt")
    if root is None:
        return None
    divided = _only(root.outputs[0], "Div")
    if divided is not None:
        if divided.inputs[1] is root.outputs[0] and divided.inputs[0] is x32:
            return divided
        inverse = is_constant(divided.inputs[0], 1.0, rtol=0) and divided.inputs[1] is root.outputs[0]
        return _product_with(divided.outputs[0], x32) if inverse else None
    reciprocal = _only(root.outputs[0], "Reciprocal")
    return _product_with(reciprocal.outputs[0], x32) if reciprocal is not None else None


def _product_with(factor: ir.Value, x32: ir.Value) -> ir.Node | None:
    product = _only(factor, "Mul")
    return product if product is not None and other_operand(product, factor) is x32 else None
