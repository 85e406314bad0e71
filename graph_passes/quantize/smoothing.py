"""Smoothing: factors that move range from the input of a product to its matrix, and change nothing else.

After SmoothQuant (Xiao et al., arXiv:2211.10438) and, for weights alone, AWQ (Lin et al., arXiv:2306.00978):
x @ W = (x / s) @ (s * W). Where x is divided by s depends on what makes it: a norm's weight, the rows of v_proj, the
rows of up. Every reader of x is multiplied, the router and the shared expert's gate too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge import names
from qwenforge.errors import GraphError
from qwenforge.exporter import weights
from qwenforge.graph_passes.functions import GROUPED_QUERY_ATTENTION, MIXTURE_OF_EXPERTS
from qwenforge.graph_passes.infra import consumers, int_attribute, is_op, set_weight, weight
from qwenforge.graph_passes.quantize.expert_weights import each_expert
from qwenforge.graph_passes.quantize.sites import ExpertSite, LinearSite, Sites, is_linear

Factors = npt.NDArray[np.floating[Any]]


def smooth(model: ir.Model, sites: Sites, name: str, factors: Factors) -> None:
    """Apply the ``factors`` of ``name`` (see :mod:`qwenforge.graph_passes.quantize.plan`) to ``model``, in place.

    Raises:
        GraphError: the graph has no such place, the factors do not fit it or are not positive, or something reads the
            smoothed tensor that cannot be multiplied.
    """
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise GraphError(f"a smoothing factor of {name} is not a positive number; calibrate again.")
    site = sites.linear.get(name)
    if name in sites.experts:
        _smooth_experts(model, sites.experts[name], factors)
    elif site is not None and site.role == "attention_output":
        _smooth_values(model, site, factors)
    elif site is not None and site.role == "mlp_output":
        _smooth_gated(model, site, factors)
    else:
        _smooth_norm(model, sites, name, factors)


def _smooth_norm(model: ir.Model, sites: Sites, name: str, factors: Factors) -> None:
    norm = _norm(sites, name)
    _require_shape(name, factors, weights.dims(_constant(norm, 1)))
    readers = list(_readers(norm.outputs[0], name))
    _scale(model, norm, 1, 1 / factors)
    for reader in readers:
        if reader.op_type == MIXTURE_OF_EXPERTS:
            _scale_experts(model, reader, 2, lambda _: factors[None, :])
        else:
            _scale(model, reader, 1, factors[:, None])


def _norm(sites: Sites, name: str) -> ir.Node:
    """The norm called ``name``, found by what reads it: the layer's projections or its feed-forward part."""
    layer, _, part = name.rpartition(".")
    starts = {
        "input_layernorm": [f"{layer}.self_attn.q_proj"],
        "post_attention_layernorm": [f"{layer}.mlp.gate", f"{layer}.mlp.gate_up_proj", f"{layer}.mlp.gate_proj"],
    }.get(part, [])
    for start in starts:
        value = sites.linear[start].node.inputs[0] if start in sites.linear else None
        while (forwarding := value.producer() if value is not None else None) is not None:
            if forwarding.op_type == "RMSNormalization" and not forwarding.domain:
                return forwarding
            if forwarding.op_type not in ("Reshape", "Cast"):
                break
            value = forwarding.inputs[0]
    raise GraphError(f"the plan smooths {name}, which the graph does not have; calibrate this graph itself.")


def _readers(value: ir.Value, name: str) -> list[ir.Node]:
    """The products and experts that read ``value``, through reshapes and casts."""
    if value.is_graph_output():
        raise GraphError(f"{name} cannot be smoothed: its result is an output of the graph.")
    found = []
    for node in consumers(value):
        if node.op_type in ("Reshape", "Cast") and not node.domain and node.inputs[0] is value:
            found += _readers(node.outputs[0], name)
        elif node.op_type == "Shape" and not node.domain:
            continue
        elif node.inputs[0] is value and (_is_experts(node) or is_linear(node)):
            found.append(node)
        else:
            raise GraphError(f"{name} cannot be smoothed: {node.op_type} (node {node.name}) reads its result.")
    return found


def _is_experts(node: ir.Node) -> bool:
    return node.op_type == MIXTURE_OF_EXPERTS and node.domain == names.DOMAIN


def _smooth_values(model: ir.Model, site: LinearSite, factors: Factors) -> None:
    """o_proj's input are values averaged: its factors divide the rows of v_proj, one for each channel of a key head."""
    attention = _attention_before(site)
    heads, key_heads = (int_attribute(attention, kind, 0) for kind in ("num_heads", "num_key_value_heads"))
    value = attention.inputs[2]
    added = is_op(value, "Add")
    bias = None
    if added is not None:
        bias = next((index for index in (0, 1) if weight(added.inputs[index]) is not None), None)
        value = added.inputs[1 - bias] if bias is not None else value
    product = is_op(value, "MatMul")
    if product is None or weight(product.inputs[1]) is None or len(product.outputs[0].uses()) != 1:
        raise GraphError(f"{site.name} cannot be smoothed: its values are not made by one projection alone.")
    _require_shape(site.name, factors, weights.dims(_constant(product, 1))[1:])
    _scale(model, product, 1, 1 / factors[None, :])
    if added is not None and bias is not None:
        _scale(model, added, bias, 1 / factors)
    by_query_head = np.repeat(factors.reshape(key_heads, -1), heads // key_heads, axis=0).reshape(-1, 1)
    _scale(model, site.node, 1, by_query_head)


def _attention_before(site: LinearSite) -> ir.Node:
    value = site.node.inputs[0]
    while (node := value.producer() if value is not None else None) is not None:
        if node.op_type == GROUPED_QUERY_ATTENTION:
            return node
        value = node.inputs[0]
    raise GraphError(f"{site.name} cannot be smoothed: there is no attention before it.")


def _smooth_gated(model: ir.Model, site: LinearSite, factors: Factors) -> None:
    """down_proj's input is activated(gate) * up: its factors divide the rows of up."""
    _require_shape(site.name, factors, weights.dims(site.weight)[:1])
    gated = is_op(site.node.inputs[0], "Mul")
    activated = [value is not None and _is_swish(value.producer()) for value in gated.inputs] if gated else []
    up = gated.inputs[activated.index(False)] if gated is not None and activated.count(True) == 1 else None
    split = is_op(up, "Split")
    product = is_op(split.inputs[0] if split is not None else up, "MatMul")
    if gated is None or up is None or product is None or weight(product.inputs[1]) is None:
        raise GraphError(f"{site.name} cannot be smoothed: its input is not gate times up of one product.")
    if len(gated.outputs[0].uses()) != 1 or len(up.uses()) != 1:
        raise GraphError(f"{site.name} cannot be smoothed: something else reads its input.")
    divisors: Factors = 1 / factors
    if split is not None:
        halves: list[Factors] = [np.ones_like(factors), np.ones_like(factors)]
        halves[up.index() or 0] = divisors
        divisors = np.concatenate(halves)
    _require_shape(site.name, divisors, weights.dims(_constant(product, 1))[1:])
    _scale(model, product, 1, divisors[None, :])
    _scale(model, site.node, 1, factors[:, None])


def _is_swish(node: ir.Node | None) -> bool:
    return node is not None and node.op_type in ("Swish", "QuickGelu")


def _smooth_experts(model: ir.Model, site: ExpertSite, factors: Factors) -> None:
    """As for one feed-forward part, expert by expert; ``factors`` [E, I]."""
    experts, rows, _ = weights.dims(_constant(site.node, 2))
    _require_shape(site.name, factors, (experts, rows // 2))
    ones = np.ones_like(factors[0])
    _scale_experts(model, site.node, 2, lambda index: np.concatenate([ones, 1 / factors[index]])[:, None])
    _scale_experts(model, site.node, 3, lambda index: factors[index][None, :])


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol:
    tensor = weight(node.inputs[index])
    if tensor is None:
        raise GraphError(f"{node.op_type} (node {node.name}) cannot be smoothed: its weight is not a constant.")
    return tensor


def _scale(model: ir.Model, node: ir.Node, index: int, factors: Factors) -> None:
    set_weight(model, node, index, _multiplied(_constant(node, index), factors))


def _scale_experts(model: ir.Model, node: ir.Node, index: int, factors: Callable[[int], Factors]) -> None:
    tensor = _constant(node, index)
    set_weight(model, node, index, each_expert(tensor, lambda one, expert: _multiplied(one, factors(expert))))


def _multiplied(tensor: ir.TensorProtocol, factors: Factors) -> ir.TensorProtocol:
    by = ir.tensor(np.ascontiguousarray(factors, dtype=np.float32), name="smoothing")
    return weights.cast(weights.multiply(tensor, by), tensor.dtype)


def _require_shape(name: str, factors: Factors, expected: tuple[int, ...]) -> None:
    if factors.shape != expected:
        raise GraphError(
            f"the smoothing factors of {name} are {list(factors.shape)} and the graph wants {list(expected)}; "
            "calibrate this graph itself."
        )
