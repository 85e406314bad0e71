"""The ops of libqwenforge_cpu.so (plugins/cpu): their places of inputs, and the rules that bring them in, in order.

The rules follow those for ONNX Runtime's own kernels with products in blocks and take over what those made: each
replaces operators by one that computes the same. A form that our kernels do not have stays with ONNX Runtime.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.infra import FusionPass, float_attribute, int_attribute, is_op, tag

MICROSOFT = "com.microsoft"

LINEAR = "QuantizedLinear"
GATED_MLP = "QuantizedGatedMlp"
MIXTURE_OF_EXPERTS = "QuantizedMixtureOfExperts"
ATTENTION = "CachedAttention"

PROLOGUES = {LINEAR: 5, GATED_MLP: 10, MIXTURE_OF_EXPERTS: 18}
"""Place of the residual among an op's inputs; the norm's weight follows it."""

EPSILON = "epsilon"

BIAS = 5
"""Place of a MatMulNBits' bias among its inputs."""
_ZERO_POINTS = 3

_ACTIVATION_GROUP = 16
"""Our kernels take groups of multiples of it."""


def cpu_op_rules(*, half_caches: bool = False) -> list[FusionPass]:
    """What brings our ops, with fp16 caches on demand, into a graph that was lowered for ONNX Runtime's kernels."""
    from qwenforge.graph_passes.lower.cpu_attention import UseCachedAttention
    from qwenforge.graph_passes.lower.cpu_caches import HalfCaches
    from qwenforge.graph_passes.lower.cpu_experts import UseQuantizedMixtureOfExperts
    from qwenforge.graph_passes.lower.cpu_gated_mlp import UseQuantizedGatedMlp
    from qwenforge.graph_passes.lower.cpu_linear import UseQuantizedLinear
    from qwenforge.graph_passes.lower.cpu_norms import NormAsPrologue

    return [
        UseCachedAttention(),
        *([HalfCaches()] if half_caches else []),
        UseQuantizedMixtureOfExperts(),
        UseQuantizedGatedMlp(),
        UseQuantizedLinear(),
        NormAsPrologue(),
    ]


def block_product(value: ir.Value | None) -> ir.Node | None:
    """The product by a quantized matrix behind ``value``, where our kernels compute it; without a bias."""
    node = is_op(value, "MatMulNBits", MICROSOFT)
    return node if node is not None and is_supported(node) and len(node.inputs) <= _ZERO_POINTS + 1 else None


def is_supported(product: ir.Node) -> bool:
    """Whether our kernels read the matrix of this MatMulNBits: 4 or 8 bits, blocks of a multiple of 16."""
    packed_zero_points = product.inputs[_ZERO_POINTS] if len(product.inputs) > _ZERO_POINTS else None
    return (
        int_attribute(product, "bits", 4) in (4, 8)
        and int_attribute(product, "block_size", 0) % _ACTIVATION_GROUP == 0
        and (packed_zero_points is None or packed_zero_points.dtype == ir.DataType.UINT8)
        and all(value is None for value in product.inputs[_ZERO_POINTS + 1 : BIAS])
    )


def matrix(product: ir.Node) -> list[ir.Value | None]:
    """Codes, scales and zero points (None: the middle) of a MatMulNBits."""
    return [
        *product.inputs[1:_ZERO_POINTS],
        product.inputs[_ZERO_POINTS] if len(product.inputs) > _ZERO_POINTS else None,
    ]


def make(
    model: ir.Model,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: dict[str, Any],
    name: str | None,
    rule: str,
) -> ir.Node:
    """A node of our domain with a result and, not yet wanted, the sum of its prologue."""
    model.graph.opset_imports[names.CPU_DOMAIN] = 1
    epsilon = {EPSILON: 0.0} if op_type in PROLOGUES else {}
    return tag(ir.node(op_type, inputs, {**attributes, **epsilon}, domain=names.CPU_DOMAIN, name=name), rule)


def epsilon_of(norm: ir.Node) -> float:
    """What a norm adds to the mean of squares."""
    return float_attribute(norm, EPSILON, 1e-5)
