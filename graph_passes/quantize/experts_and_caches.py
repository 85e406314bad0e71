"""Experts whose tokens are quantized, and caches of 8 bits: calls of the quantized functions with their scales."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.graph_passes.functions import QUANTIZED_ATTENTION, QUANTIZED_EXPERTS, register_function
from qwenforge.graph_passes.infra import add_initializer, static_dim, weight
from qwenforge.graph_passes.quantize.activations import rounded_scale
from qwenforge.graph_passes.quantize.sites import CacheSite, ExpertSite

Scales = npt.NDArray[np.float32]

CACHE_DTYPES: dict[Literal["int8", "fp8"], ir.DataType] = {
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}
_PAST, _PRESENT = (3, 4), (1, 2)


def quantize_tokens(model: ir.Model, site: ExpertSite, scales: Scales) -> None:
    """Let the experts of ``site`` round their tokens and activated channels to E4M3; ``scales`` [1 + E].

    The scales are rounded to the tokens' dtype, as those in front of products are.
    """
    gate_up = weight(site.node.inputs[2])
    assert gate_up is not None
    _require(f"{site.name}.activation_scales", scales, (1 + gate_up.shape.numpy()[0],))
    tokens = site.node.inputs[0]
    if tokens is None or tokens.dtype is None:
        raise GraphError(f"the tokens of {site.name} have no known type to quantize.")
    kind = tokens.dtype
    rounded = np.array([rounded_scale(float(scale), kind).astype(np.float32) for scale in scales])
    site.node.op_type = QUANTIZED_EXPERTS
    _append(model, site.node, f"{site.name}.activation_scales", rounded)
    register_function(model, QUANTIZED_EXPERTS)


def quantize_cache(
    model: ir.Model, site: CacheSite, kind: Literal["int8", "fp8"], key_scales: Scales, value_scales: Scales
) -> None:
    """Make the cache of ``site`` one of codes; ``key_scales`` [Hk, D], ``value_scales`` [Hk]."""
    past = site.node.inputs[_PAST[0]]
    heads, size = static_dim(past, 1), static_dim(past, 3)
    if heads is None or size is None:
        raise GraphError(f"{site.name} cannot be quantized: its heads and their size are not static.")
    _require(f"{site.name}.key_scales", key_scales, (heads, size))
    _require(f"{site.name}.value_scales", value_scales, (heads,))
    for value in (*(site.node.inputs[index] for index in _PAST), *(site.node.outputs[index] for index in _PRESENT)):
        assert value is not None
        value.type = ir.TensorType(CACHE_DTYPES[kind])
    site.node.op_type = QUANTIZED_ATTENTION
    _append(model, site.node, f"{site.name}.key_scales", key_scales)
    _append(model, site.node, f"{site.name}.value_scales", value_scales)
    register_function(model, QUANTIZED_ATTENTION)


def _append(model: ir.Model, node: ir.Node, name: str, scales: Scales) -> None:
    node.resize_inputs(len(node.inputs) + 1)
    node.replace_input_with(len(node.inputs) - 1, add_initializer(model, name, ir.tensor(scales, name=name)))


def _require(name: str, scales: Scales, shape: tuple[int, ...]) -> None:
    if scales.shape != shape:
        raise GraphError(f"{name} of the plan is {list(scales.shape)} and the graph wants {list(shape)}.")
    if not np.isfinite(scales).all() or not (scales > 0).all():
        raise GraphError(f"{name} of the plan holds a number that is not positive; calibrate again.")
