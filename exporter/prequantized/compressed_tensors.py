"""Checkpoints of the compressed-tensors package, which llm-compressor writes and vLLM publishes.

A matrix [N, K] in one of two layouts:

=====================  =============================  ==================================================================
tensor                 shape, dtype                   meaning
=====================  =============================  ==================================================================
weight                 [N, K] float8_e4m3fn or int8   codes (``float-``, ``int-`` or ``naive-quantized``)
weight_packed          [N, K / p] int32               codes plus 2^(bits - 1), p = 32 / bits a word (``pack-quantized``)
weight_shape           [2] int64                      N and K of packed weights
weight_scale           [N, G], [N, 1] or [1] float    value = (code - zero point) * scale
weight_zero_point      [N, G] int8, or [N / p, G]     packed along N where the weights are packed; none when symmetric
weight_g_idx           [K] int32                      the group of each input channel; only with act-order
input_scale            [1] float                      of the module's input, where that is static
k_scale, v_scale       [1] float                      of a layer's keys and values, on ``self_attn``
=====================  =============================  ==================================================================

Source: compressed-tensors 0.20's ``compressors/naive_quantized`` and ``compressors/pack_quantized``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from qwenforge.errors import CheckpointError, UnsupportedError
from qwenforge.exporter.prequantized.format import (
    FLOATS,
    CacheScales,
    Format,
    Part,
    Parts,
    Settings,
    float32,
    groups,
    require_ordered_groups,
    small,
)
from qwenforge.exporter.prequantized.scales import ONE, as_column, block_rows
from qwenforge.exporter.prequantized.unpack import WORD_BITS, unpack
from qwenforge.exporter.quantized_weights import CODE_DTYPES, QuantizedWeight

_PACKED, _PLAIN = ("pack-quantized",), ("float-quantized", "int-quantized", "naive-quantized")


class CompressedTensors(Format):
    """8-bit floating-point weights, 8-bit integers, or packed 4- and 8-bit integers; one scheme for all modules."""

    method = "compressed-tensors"

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Read ``quantization_config``; raises UnsupportedError when a field asks for something else."""
        self.where = where
        Settings(values, where).choice("quantization_status", ("compressed",), "compressed")
        for field in ("sparsity_config", "transform_config"):
            if values.get(field) and values[field].get("format") != "dense":
                raise self.refuse(f"{field!r} is not supported; use a checkpoint that is quantized and nothing else")
        scheme = self._scheme(values)
        layout = scheme.get("format") or values.get("format")
        Settings({"format": layout}, where).choice("format", _PACKED + _PLAIN)
        self._packed = layout in _PACKED
        self.markers = ("weight_scale", "weight_packed", "weight_shape")
        self._read_weights(scheme["weights"])
        self._read_inputs(scheme.get("input_activations"))
        self.cache = _cache(values.get("kv_cache_scheme"), where)

    def _scheme(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The one scheme of all groups of modules."""
        schemes = list((values.get("config_groups") or {}).values())
        if not schemes or not all(isinstance(scheme, Mapping) and scheme.get("weights") for scheme in schemes):
            raise self.refuse("'config_groups' must say how weights are quantized; nothing else is supported")
        compared = [{key: scheme.get(key) for key in ("weights", "input_activations", "format")} for scheme in schemes]
        if any(other != compared[0] for other in compared):
            raise self.refuse("'config_groups' mix several schemes; use a checkpoint with one for all its modules")
        return compared[0]

    def _read_weights(self, arguments: Mapping[str, Any]) -> None:
        settings = Settings(arguments, f"{self.where}: weights")
        kind = settings.choice("type", ("int",) if self._packed else ("int", "float"), "int")
        self._code_bits: int = settings.choice("num_bits", (4, 8) if self._packed else (8,))
        self._symmetric: bool = settings.choice("symmetric", (True,) if kind == "float" else (True, False), True)
        strategies = ("tensor", "channel", "group") + (("block",) if kind == "float" else ())
        strategy = settings.choice("strategy", strategies, "channel")
        self._group_size = settings.group_size() if strategy == "group" else None
        self._per_tensor = strategy == "tensor"
        self._block: tuple[int, int] | None = None
        if strategy == "block":
            settings.choice("block_structure", ([128, 128],))
            self._block = (128, 128)
        if kind == "float":
            self.weight_format = "fp8"
        elif self._code_bits == 8:
            self.weight_format = "int8"
        else:
            self.weight_format = "int4" if self._symmetric else "uint4"
        per_group = 16.0 if self._symmetric else 16.0 + self._code_bits
        self.bits = self._code_bits + (per_group / self._group_size if self._group_size else 0.0)

    def _read_inputs(self, arguments: Mapping[str, Any] | None) -> None:
        if not arguments:
            return
        settings = Settings(arguments, f"{self.where}: input_activations")
        settings.choice("num_bits", (8,))
        kind = settings.choice("type", ("int", "float"), "int")
        self.dynamic = arguments.get("dynamic") in (True, "local")
        if self.dynamic:
            return
        settings.choice("symmetric", (True,), True)
        settings.choice("strategy", ("tensor",), "tensor")
        self.activation = "fp8" if kind == "float" else "int8"

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        count = groups(columns, self._group_size or columns)
        scales: tuple[tuple[int, ...], ...] = ((rows, count),)
        if self._block is not None:
            scales = ((groups(rows, self._block[0]), groups(columns, self._block[1])),)
        elif self._per_tensor:
            scales = ONE
        elif self._group_size is None:
            scales = ((rows, 1), (rows,))
        found = {"weight_scale": Part(scales, FLOATS)}
        packed = WORD_BITS // self._code_bits
        if self._packed:
            if rows % packed or columns % packed:
                raise self.refuse(f"a matrix of {rows} x {columns} cannot be packed {packed} codes a word")
            found["weight_packed"] = Part(((rows, columns // packed),), ("I32",))
            found["weight_shape"] = Part(((2,),), ("I64", "I32"))
            found["weight_g_idx"] = Part(((columns,),), ("I32",), required=False)
        else:
            found["weight"] = Part(((rows, columns),), ("F8_E4M3",) if self.weight_format == "fp8" else ("I8",))
        if not self._symmetric:
            packs = self._packed and not self._per_tensor
            points = ((rows // packed, count),) if packs else scales
            found["weight_zero_point"] = Part(points, ("I32",) if packs else ("I8",))
        if self.activation is not None:
            found["input_scale"] = Part(ONE, FLOATS)
            found["input_zero_point"] = Part(ONE, ("I8", "F8_E4M3"), required=False)
        return found

    def check(self, module: str, parts: Parts, rows: int, columns: int) -> None:
        if "weight_shape" in parts and small(parts["weight_shape"]).tolist() != [rows, columns]:
            raise CheckpointError(
                f"{module}.weight_shape is {small(parts['weight_shape']).tolist()} but config.json makes it "
                f"{[rows, columns]}: correct config.json or use the matching weights"
            )
        if "weight_g_idx" in parts:
            require_ordered_groups(module, "weight_g_idx", parts["weight_g_idx"], self._group_size or columns)
        if "input_zero_point" in parts and small(parts["input_zero_point"]).astype(np.float32).any():
            raise UnsupportedError(
                f"{module}.input_zero_point is not 0; only symmetric activations are supported: use such a checkpoint"
            )

    def weight(self, parts: Parts, rows: int, columns: int) -> QuantizedWeight:
        dtype = CODE_DTYPES[self.weight_format]
        offset = 0 if self.weight_format == "uint4" else -(1 << (self._code_bits - 1))
        scales = float32(parts["weight_scale"])
        if self._block is not None:
            return QuantizedWeight(parts["weight"], block_rows(scales, rows, self._block[0]), None, self._block[1])
        if self._group_size is None:
            scales = as_column(scales, rows)
        points = None
        if not self._symmetric:
            stored = parts["weight_zero_point"]
            if self._packed and not self._per_tensor:
                points = unpack(stored, self._code_bits, dtype, add=offset, across_rows=True)
            elif self.weight_format == "uint4":
                raise UnsupportedError(f"{self.where}: one zero point for a whole 4-bit tensor is not supported")
            else:
                points = as_column(stored, rows) if self._group_size is None else stored
        codes = unpack(parts["weight_packed"], self._code_bits, dtype, add=offset) if self._packed else parts["weight"]
        return QuantizedWeight(codes, scales, points, self._group_size or columns)


def _cache(scheme: Any, where: str) -> CacheScales | None:
    """What ``kv_cache_scheme`` says; refuses all but one static symmetric scale of 8-bit numbers."""
    if not scheme:
        return None
    settings = Settings(scheme, f"{where}: kv_cache_scheme")
    settings.choice("num_bits", (8,))
    settings.choice("symmetric", (True,), True)
    settings.choice("strategy", ("tensor",), "tensor")
    settings.choice("dynamic", (False,), False)
    kind: Literal["int8", "fp8"] = "fp8" if settings.choice("type", ("float", "int"), "float") == "float" else "int8"
    return CacheScales(kind)
