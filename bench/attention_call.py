"""A call of the attention kernels: its tensors checked against plugins/attention/op.yaml, and what C++ is handed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from qwenforge.bench.dlpack import KernelError, Tensor

CACHE_TYPES = {"float": 0, "fp8": 1, "int8": 2}
"""qwenforge::CacheType."""


class AttentionShape(ctypes.Structure):
    """qwenforge::AttentionShape."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "sequence", "capacity", "cache_rows", "positions")),
        *(
            (name, ctypes.c_int32)
            for name in ("heads", "kv_heads", "head_size", "window", "page_size", "cache_type", "packed", "norm")
        ),
        *((name, ctypes.c_float) for name in ("scale", "epsilon")),
    )


@dataclass(frozen=True)
class Attention:
    """A layer's heads, tables and caches, as in op.yaml.

    cos, sin [P, D / 2]; keys, values [B, Hk, M, D], or with a page_table [B, pages of a row] pages [N, Hk, page, D].
    Caches of another type than the tokens are int8 and have key_scales [Hk, D] and value_scales [Hk], fp32. query_norm
    and key_norm [D] ask for the norm of the heads.
    """

    heads: int
    kv_heads: int
    scale: float
    cos: Any
    sin: Any
    keys: Any
    values: Any
    cache_type: str = "float"
    key_scales: Any = None
    value_scales: Any = None
    page_table: Any = None
    query_norm: Any = None
    key_norm: Any = None
    epsilon: float = 1e-6
    window: int = 0


def attention_arguments(
    query: Any, key: Any, value: Any, positions: Any, starts: Any, layer: Attention, output: Any
) -> tuple[AttentionShape, list[Tensor | None], str]:
    """The shape, the tensors in the order of qwenforge::AttentionTensors, and the element type of the tokens.

    query is [B, S, Hq D]; without key and value it is packed, [B, S, (Hq + 2 Hk) D].

    Raises:
        KernelError: a tensor is missing or does not fit its place; the message names it.
    """
    x, keys, cos = Tensor.of("query", query), Tensor.of("keys", layer.keys), Tensor.of("cos", layer.cos)
    if len(x.shape) != 3 or len(keys.shape) != 4 or len(cos.shape) != 2 or x.element not in ("float16", "bfloat16"):
        raise KernelError(
            f"query is {x.element} {list(x.shape)}, keys {list(keys.shape)} and cos {list(cos.shape)}: see op.yaml"
        )
    (batch, sequence, _), (rows, _, slots, _) = x.shape, keys.shape
    positions_count, size = cos.shape[0], 2 * cos.shape[1]
    paged, quantized = layer.page_table is not None, layer.cache_type != "float"
    packed, norm = key is None and value is None, layer.query_norm is not None or layer.key_norm is not None
    table = Tensor.of("page_table", layer.page_table).shape if paged else ()
    if paged and len(table) != 2:
        raise KernelError(f"page_table has {len(table)} dimensions, not 2")
    shape = AttentionShape(
        batch,
        sequence,
        table[1] * slots if paged else slots,
        rows,
        positions_count,
        layer.heads,
        layer.kv_heads,
        size,
        layer.window,
        slots if paged else 0,
        CACHE_TYPES[layer.cache_type],
        packed,
        norm,
        layer.scale,
        layer.epsilon,
    )
    kv_width, cache = layer.kv_heads * size, (rows, layer.kv_heads, slots, size)
    stored = "int8" if quantized else x.element
    width = (layer.heads + (2 * layer.kv_heads if packed else 0)) * size
    wanted: list[tuple[str, Any, tuple[int, ...], str, bool]] = [
        ("query", query, (batch, sequence, width), x.element, True),
        ("key", key, (batch, sequence, kv_width), x.element, not packed),
        ("value", value, (batch, sequence, kv_width), x.element, not packed),
        ("cos", layer.cos, (positions_count, size // 2), x.element, True),
        ("sin", layer.sin, (positions_count, size // 2), x.element, True),
        ("positions", positions, (batch, sequence), "int32", True),
        ("starts", starts, (batch,), "int32", True),
        ("query_norm", layer.query_norm, (size,), x.element, norm),
        ("key_norm", layer.key_norm, (size,), x.element, norm),
        ("key_scales", layer.key_scales, (layer.kv_heads, size), "float32", quantized),
        ("value_scales", layer.value_scales, (layer.kv_heads,), "float32", quantized),
        ("page_table", layer.page_table, (batch, *table[1:]), "int32", paged),
        ("keys", layer.keys, cache, stored, True),
        ("values", layer.values, cache, stored, True),
        ("output", output, (batch, sequence, layer.heads * size), x.element, True),
    ]
    tensors: list[Tensor | None] = []
    for name, given, dimensions, element, present in wanted:
        tensors.append(Tensor.of(name, given) if present else None)
        if (tensor := tensors[-1]) is not None:
            tensor.require(name, dimensions, element)
    return shape, tensors, x.element
