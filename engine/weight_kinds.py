"""What an initializer is for (embedding, attention, experts...), told by its name, or its user's name or kind."""

from __future__ import annotations

import re

import onnx_ir as ir

from qwenforge.engine.layer_recognition import innermost_scope

KINDS = (
    "embedding",
    "attention",
    "mlp",
    "experts",
    "shared expert",
    "router",
    "norms",
    "lm_head",
    "rope tables",
    "constants and other",
)
"""In the order of a report."""

_BY_NAME = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("rope tables", r"rotary|inv_freq|rope|(?:^|[./_])(?:cos|sin)(?:[./_]|$)"),
        ("norms", r"norm"),
        ("shared expert", r"shared_expert"),
        ("experts", r"experts?(?:[./_]|$)"),
        ("router", r"mlp[./]gate(?:[./]|$)|router"),
        ("lm_head", r"lm_head"),
        ("embedding", r"embed|wte"),
        ("attention", r"attn|attention|[qkv]_proj|qkv"),
        ("mlp", r"mlp|gate_proj|up_proj|down_proj|gate_up|feed_forward"),
    )
)

_NORMS = frozenset(
    {
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "LayerNormalization",
        "SkipLayerNormalization",
    }
)
_EXPERTS = frozenset({"MixtureOfExperts", "MoE", "QMoE", "QwenForgeMoE", "QuantizedMixtureOfExperts"})
_SMALL = 16


def weight_kind(value: ir.Value) -> str:
    """One of :data:`KINDS` for the initializer ``value``."""
    users = [node for node, _ in value.uses()]
    # A tied matrix is stored once, often under the head's name: what it is looked up for is the embedding.
    gathered = any(node.op_type in ("Gather", "GatherBlockQuantized") and node.inputs[0] is value for node in users)
    if gathered and value.shape is not None and len(value.shape) == 2 and _is_numeric_weight(value):
        return "embedding"
    if _is_small(value) and not _is_numeric_weight(value):
        return "constants and other"
    if kind := _kind_in_name(value.name):
        return kind
    if _is_small(value):
        return "constants and other"
    for node in users:
        if node.op_type in _NORMS:
            return "norms"
        if node.op_type in _EXPERTS:
            return "experts"
        if node.op_type == "RotaryEmbedding":
            return "rope tables"
        if kind := _kind_in_name(node.name) or _kind_in_name(innermost_scope(node)):
            return kind
    return "constants and other"


def _kind_in_name(name: str | None) -> str | None:
    text = (name or "").lower()
    return next((kind for kind, pattern in _BY_NAME if pattern.search(text)), None)


def _is_small(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.size <= _SMALL


def _is_numeric_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.STRING)
