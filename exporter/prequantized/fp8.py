"""FP8 checkpoints of ModelOpt (``modelopt``) and of vLLM and transformers (``fp8``).

A matrix [N, K] of float8_e4m3fn:

=================  ====================================  ===============================================================
tensor             shape, dtype                          meaning
=================  ====================================  ===============================================================
weight             [N, K] float8_e4m3fn                  codes
weight_scale       [] or [1]; [N] or [N, 1] float        value = code * scale
weight_scale_inv   [N / 128, K / 128] float              the same for blocks of 128 x 128, in spite of its name
input_scale        [] or [1] float                       of the module's input, where that is static
k_scale, v_scale   [] or [1] float                       of a layer's keys and values, on ``k_proj`` and ``v_proj`` or
                                                         ``self_attn``
=================  ====================================  ===============================================================

Sources: nvidia-modelopt 0.47's ``torch/export/unified_export_hf.py`` and ``convert_hf_config.py``; transformers'
``integrations/finegrained_fp8.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenforge.exporter.prequantized.format import (
    FLOATS,
    CacheScales,
    Format,
    Part,
    Parts,
    Settings,
    float32,
    groups,
)
from qwenforge.exporter.prequantized.scales import ONE, as_column, block_rows
from qwenforge.exporter.quantized_weights import QuantizedWeight

_BLOCK = 128


class FP8(Format):
    """8-bit floating-point weights with a scale for the tensor, for each row, or for each block."""

    weight_format = "fp8"
    bits = 8.0
    _blocks = False

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        found = {"weight": Part(((rows, columns),), ("F8_E4M3",))}
        if self._blocks:
            found["weight_scale_inv"] = Part(((groups(rows, _BLOCK), groups(columns, _BLOCK)),), FLOATS)
        else:
            found["weight_scale"] = Part((*ONE, (rows,), (rows, 1)), FLOATS)
        if self.activation is not None:
            found["input_scale"] = Part(ONE, FLOATS)
        return found

    def weight(self, parts: Parts, rows: int, columns: int) -> QuantizedWeight:
        if self._blocks:
            scales = block_rows(float32(parts["weight_scale_inv"]), rows, _BLOCK)
            return QuantizedWeight(parts["weight"], scales, None, _BLOCK)
        return QuantizedWeight(parts["weight"], as_column(float32(parts["weight_scale"]), rows), None, columns)


class PlainFP8(FP8):
    """``quant_method: fp8``."""

    method = "fp8"

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Read ``quantization_config``; raises UnsupportedError when a field asks for something else."""
        settings = Settings(values, where)
        self.where = where
        settings.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        settings.choice("scale_fmt", (None, "float"), None)
        self._blocks = values.get("weight_block_size") is not None
        if self._blocks:
            settings.choice("weight_block_size", ([_BLOCK, _BLOCK],))
        self.markers = ("weight_scale_inv",) if self._blocks else ("weight_scale",)
        scheme = settings.choice("activation_scheme", ("dynamic", "static"), "dynamic")
        self.dynamic = scheme == "dynamic"
        self.activation = None if self.dynamic else "fp8"


class ModelOpt(FP8):
    """``quant_method: modelopt``, or a ``hf_quant_config.json`` beside a config.json that says nothing."""

    method = "modelopt"
    markers = ("weight_scale",)

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Read either form of the configuration; raises UnsupportedError when it asks for something else."""
        nested = values.get("quantization")
        details = nested if isinstance(nested, Mapping) else values
        settings = Settings(details, where)
        self.where = where
        algorithm = settings.choice("quant_algo", ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"))
        self.dynamic = algorithm != "FP8"
        self.activation = None if self.dynamic else "fp8"
        if isinstance(scheme := details.get("kv_cache_scheme"), Mapping):
            cached = Settings(scheme, f"{where}: kv_cache_scheme")
            cached.choice("num_bits", (8,))
            cached.choice("type", ("float",), "float")
            self.cache = CacheScales("fp8")
        else:
            name = "kv_cache_scheme" if scheme else "kv_cache_quant_algo"
            if settings.choice(name, ("FP8", None)) == "FP8":
                self.cache = CacheScales("fp8")
