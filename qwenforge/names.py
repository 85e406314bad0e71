"""The names and shapes of every tensor that crosses the border of an exported graph.

Nothing else in the project spells these names: the exporter and the passes create graph inputs and outputs with
them, the bundle's manifest records them, and the runtimes (Python, C++) read them from the manifest.

Shapes use the documented letters: B batch, S new tokens, N tokens whose logits are wanted, M cache capacity,
V vocabulary, Hk key/value heads, D head size.

=========================  ===============  ==========================================================
tensor                     shape, dtype     meaning
=========================  ===============  ==========================================================
``input_ids``              [B, S] int64     new tokens, right-padded when rows differ in length
``position_ids``           [B, S] int64     rotary position of each new token
``cache_position``         [B] int64        tokens already in each row's cache: where its first new one goes
``logits_index``           [B, N] int64     which of the S new tokens to project onto the vocabulary
``past_key_values.i.key``  [B, Hk, M, D]    layer i's key cache (``.value`` likewise), valid up to cache_position
``present.i.key``          [B, Hk, M, D]    the same cache with the new tokens written at cache_position
``logits``                 [B, N, V] fp32   scores of the next token
=========================  ===============  ==========================================================

Caches are of the model's dtype, or INT8 or FP8 (E4M3) where the export quantized them; their scales are constants of
the graph.

A row's padding tokens are written behind its valid ones and overwritten by the next call, whose ``cache_position``
counts valid tokens only; causality keeps them invisible to the valid tokens.
"""

from __future__ import annotations

DOMAIN = "qwenforge"
"""ONNX domain of the functions that the standard lacks."""
CPU_DOMAIN = "qwenforge.cpu"
"""ONNX domain of our ops for ONNX Runtime's CPU provider."""

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
CACHE_POSITION = "cache_position"
LOGITS_INDEX = "logits_index"
LOGITS = "logits"

BATCH = "batch"
SEQUENCE = "sequence"
CAPACITY = "capacity"
LOGITS_COUNT = "logits_count"


def past_key(layer: int) -> str:
    """Graph input holding layer ``layer``'s key cache, [B, Hk, M, D]."""
    return f"past_key_values.{layer}.key"


def past_value(layer: int) -> str:
    """Graph input holding layer ``layer``'s value cache, [B, Hk, M, D]."""
    return f"past_key_values.{layer}.value"


def present_key(layer: int) -> str:
    """Graph output for layer ``layer``'s key cache; bind it to the same buffer as :func:`past_key`."""
    return f"present.{layer}.key"


def present_value(layer: int) -> str:
    """Graph output for layer ``layer``'s value cache; bind it to the same buffer as :func:`past_value`."""
    return f"present.{layer}.value"
