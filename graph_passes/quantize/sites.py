"""The places of a portable graph that can be quantized, found by structure and named as the checkpoint's modules are.

They are found in a quantized graph too.

=================================  ====================================================================================
name                               what it is
=================================  ====================================================================================
``model.layers.0.self_attn.q_proj``  likewise ``k_proj``, ``v_proj`` and ``o_proj``
``model.layers.0.mlp.gate_up_proj``  gate and up in one product, or ``gate_proj`` and ``up_proj``; ``down_proj``
``model.layers.0.mlp.shared_expert.gate_up_proj``  likewise ``down_proj``
``model.layers.0.mlp.gate``          the router; ``model.layers.0.mlp.shared_expert_gate``
``model.layers.0.mlp.experts``       the routed experts of a layer
``model.layers.0.self_attn.cache``   the key/value cache of a layer
``lm_head``                          the vocabulary projection
=================================  ====================================================================================

The layer's number is that of the cache its attention writes, so that anybody's graph gets the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.functions import (
    GROUPED_QUERY_ATTENTION,
    MIXTURE_OF_EXPERTS,
    QUANTIZED_ATTENTION,
    QUANTIZED_EXPERTS,
)
from qwenforge.graph_passes.infra import consumers, is_op, weight

Role = Literal["qkv", "attention_output", "mlp_input", "mlp_output", "router", "shared_gate", "vocabulary"]

KEPT_BY_DEFAULT: frozenset[Role] = frozenset({"router", "shared_gate", "vocabulary"})
"""Roles that a recipe leaves in high precision unless it says otherwise."""


@dataclass(frozen=True)
class LinearSite:
    """A product of activations and a constant matrix.

    Attributes:
        name: see above.
        role: what the product is for.
        layer: its layer; None for the vocabulary projection.
        node: the MatMul; its input 0 are the activations [.., K], its input 1 the matrix [K, N].
    """

    name: str
    role: Role
    layer: int | None
    node: ir.Node

    @property
    def weight(self) -> ir.TensorProtocol:
        """The matrix, [K, N]."""
        tensor = weight(self.node.inputs[1])
        assert tensor is not None
        return tensor


@dataclass(frozen=True)
class ExpertSite:
    """The routed experts of a layer: ``node`` is the call of ``qwenforge::MixtureOfExperts``."""

    name: str
    layer: int
    node: ir.Node


@dataclass(frozen=True)
class CacheSite:
    """The cache of a layer: ``node`` is the call of ``qwenforge::GroupedQueryAttention``."""

    name: str
    layer: int
    node: ir.Node


@dataclass(frozen=True)
class Sites:
    """All sites of a graph by name, in execution order; ``unknown`` are products by constants of no known role."""

    linear: dict[str, LinearSite]
    experts: dict[str, ExpertSite]
    caches: dict[str, CacheSite]
    unknown: tuple[ir.Node, ...]


def find_sites(model: ir.Model) -> Sites:
    """The sites of a portable model of any depth, or of one piece of it with its layer's attention."""
    linear: dict[str, LinearSite] = {}
    experts: dict[str, ExpertSite] = {}
    caches: dict[str, CacheSite] = {}
    unknown: list[ir.Node] = []
    layer: int | None = None
    pending: list[ir.Node] = []  # q, k and v come before the attention that tells their layer

    def place(node: ir.Node) -> None:
        found = _role(node)
        if found is None:
            unknown.append(node)
            return
        role, name = found
        if role == "vocabulary":
            linear[name] = LinearSite(name, role, None, node)
        elif layer is None:
            unknown.append(node)
        else:
            full = f"model.layers.{layer}.{name}"
            linear[full] = LinearSite(full, role, layer, node)

    for node in model.graph:
        if _is_attention(node):
            layer = _layer(node)
            name = f"model.layers.{layer}.self_attn.cache"
            caches[name] = CacheSite(name, layer, node)
            for product in pending:
                place(product)
            pending = []
        elif _is_experts(node) and layer is not None:
            name = f"model.layers.{layer}.mlp.experts"
            experts[name] = ExpertSite(name, layer, node)
        elif is_linear(node):
            found = _role(node)
            if found is not None and found[0] == "qkv":
                pending.append(node)
            else:
                place(node)
    unknown += pending
    return Sites(linear, experts, caches, tuple(unknown))


def _is_attention(node: ir.Node) -> bool:
    return node.domain == names.DOMAIN and node.op_type in (GROUPED_QUERY_ATTENTION, QUANTIZED_ATTENTION)


def _is_experts(node: ir.Node) -> bool:
    return node.domain == names.DOMAIN and node.op_type in (MIXTURE_OF_EXPERTS, QUANTIZED_EXPERTS)


def is_linear(node: ir.Node) -> bool:
    """Whether ``node`` multiplies activations by a constant matrix."""
    if node.op_type != "MatMul" or node.domain or weight(node.inputs[0]) is not None:
        return False
    matrix = weight(node.inputs[1])
    return matrix is not None and len(matrix.shape) == 2


def _layer(attention: ir.Node) -> int:
    past = attention.inputs[3]
    found = re.fullmatch(r"past_key_values\.(\d+)\.key", (past.name or "") if past is not None else "")
    if found is None:
        raise ValueError(f"{attention.name} does not read a cache of the portable form")
    return int(found[1])


def _role(node: ir.Node) -> tuple[Role, str] | None:
    """What ``node`` is for and its name within the layer, by where its result goes and its input comes from."""
    for use, index in _uses(node.outputs[0]):
        if _is_attention(use) and index < 3:
            return "qkv", f"self_attn.{'qkv'[index]}_proj"
        if _is_experts(use) and index == 1:
            return "router", "mlp.gate"
    source = _behind_reshapes(node.inputs[0])
    maker = source.producer() if source is not None else None
    if maker is not None and _is_attention(maker):
        return "attention_output", "self_attn.o_proj"
    if any(value.is_graph_output() and value.name == names.LOGITS for value in _forwarded(node.outputs[0])):
        return "vocabulary", "lm_head"
    if any(use.op_type == "Sigmoid" for use in consumers(node.outputs[0])):
        return "shared_gate", "mlp.shared_expert_gate"
    inside = "mlp.shared_expert" if _is_shared_expert(node) else "mlp"
    part = _gated_part(node)
    if part is not None:
        return "mlp_input", f"{inside}.{part}"
    if _reads_gated_product(node):
        return "mlp_output", f"{inside}.down_proj"
    return None


_TRANSPARENT = ("Reshape", "Cast", "QuantizeLinear", "DequantizeLinear")
"""What stands between a value and a product that reads it, quantized or not."""

_FORWARDING = ("Add", "Reshape", "Cast", "Identity", "RMSNormalization", "Transpose")


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Uses of ``value``, behind its bias, a norm of its heads and reshapes."""
    for found in _forwarded(value):
        yield from found.uses()


def _forwarded(value: ir.Value) -> list[ir.Value]:
    """``value``, and what a bias, a norm of heads, casts and reshapes make of it; never the residual stream."""
    found = [value]
    for current in found:
        for use, index in current.uses():
            if use.domain or use.op_type not in _FORWARDING or (index and use.op_type != "Add"):
                continue
            if use.op_type != "Add" or weight(use.inputs[1 - index]) is not None:
                found.append(use.outputs[0])
    return found


def _behind_reshapes(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (node := value.producer()) is not None and node.op_type in _TRANSPARENT:
        value = node.inputs[0]
    return value


def _gated_part(node: ir.Node) -> str | None:
    """``gate_up_proj`` where both halves come out of ``node``, ``gate_proj`` or ``up_proj`` where one does."""
    for use in consumers(node.outputs[0]):
        if use.op_type == "Split" and any(_is_swish(each) for out in use.outputs for each in consumers(out)):
            return "gate_up_proj"
        if _is_swish(use):
            return "gate_proj"
        if use.op_type == "Mul" and any(_is_activated(value) for value in use.inputs):
            return "up_proj"
    return None


def _is_swish(node: ir.Node) -> bool:
    return node.op_type in ("Swish", "QuickGelu")


def _is_activated(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and _is_swish(producer)


def _reads_gated_product(node: ir.Node) -> bool:
    product = is_op(_behind_reshapes(node.inputs[0]), "Mul")
    return product is not None and any(_is_activated(value) for value in product.inputs)


def _is_shared_expert(node: ir.Node) -> bool:
    """Whether the experts of the same layer read the same tokens, or the result is weighted by a gate."""
    source = node.inputs[0]
    while source is not None:
        if any(_is_experts(use) for use in consumers(source)):
            return True
        maker = source.producer()
        source = maker.inputs[0] if maker is not None and maker.op_type in _TRANSPARENT else None
    for use in consumers(node.outputs[0]):
        if use.op_type == "Mul" and any(is_op(value, "Sigmoid") is not None for value in use.inputs):
            return True
    return False
