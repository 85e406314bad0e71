"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them and the Qwen team publishes them.

A matrix [N, K] is stored transposed, p = 32 / bits codes of a column of the transposed matrix in a word:

==========  ==================  ==========================================================================
tensor      shape, dtype        meaning
==========  ==================  ==========================================================================
qweight     [K / p, N] int32    unsigned codes, p consecutive input channels a word, the first lowest
qzeros      [G, N / p] int32    zero points, p consecutive output channels a word; less 1 in format ``gptq``
scales      [G, N] float        value = (code - zero point) * scale
g_idx       [K] int32           the group of each input channel
==========  ==================  ==========================================================================

AutoGPTQ gives every module a bias, of zeros where the model has none. Source: AutoGPTQ 0.7.1's ``qlinear_cuda_old.py``;
GPTQModel's ``gptq_v2`` differs in the zero points alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qwenforge.errors import UnsupportedError
from qwenforge.exporter import weights
from qwenforge.exporter.prequantized.format import (
    FLOATS,
    Format,
    Part,
    Parts,
    Settings,
    float32,
    groups,
    require_ordered_groups,
    small,
)
from qwenforge.exporter.prequantized.unpack import WORD_BITS, unpack
from qwenforge.exporter.quantized_weights import CODE_DTYPES, QuantizedWeight
from qwenforge.exporter.transforms import Array


class GPTQ(Format):
    """4- or 8-bit weights; symmetric ones become signed codes without zero points."""

    method = "gptq"
    markers = ("qweight", "qzeros", "scales")

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Read ``quantization_config``; raises UnsupportedError when a field asks for something else."""
        settings = Settings(values, where)
        self.where = where
        self._code_bits: int = settings.choice("bits", (4, 8))
        self._symmetric: bool = settings.choice("sym", (True, False), True)
        version = settings.choice("checkpoint_format", ("gptq", "gptq_v2"), values.get("format", "gptq"))
        self._stored_less = 1 if version == "gptq" else 0
        self._group_size = settings.group_size()
        if values.get("dynamic"):
            raise self.refuse("'dynamic' gives modules different formats; use a checkpoint with one for all of them")
        self._middle = 1 << (self._code_bits - 1)
        if self._code_bits == 8:
            self.weight_format = "int8"
        else:
            self.weight_format = "int4" if self._symmetric else "uint4"
        per_group = 16.0 if self._symmetric else 16.0 + self._code_bits
        self.bits = self._code_bits + (per_group / self._group_size if self._group_size else 0.0)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        packed = WORD_BITS // self._code_bits
        if rows % packed or columns % packed:
            raise self.refuse(f"a matrix of {rows} x {columns} cannot be packed {packed} codes a word")
        count = groups(columns, self._group_size or columns)
        return {
            "qweight": Part(((columns // packed, rows),), ("I32",)),
            "qzeros": Part(((count, rows // packed),), ("I32",)),
            "scales": Part(((count, rows),), FLOATS),
            "g_idx": Part(((columns,),), ("I32",), required=False),
        }

    def check(self, module: str, parts: Parts, rows: int, columns: int) -> None:
        if "g_idx" in parts:
            require_ordered_groups(module, "g_idx", parts["g_idx"], self._group_size or columns)
        points = self._zero_points(parts["qzeros"])
        if self._symmetric:
            if (points != self._middle).any():
                other = int(points[points != self._middle][0])
                raise UnsupportedError(
                    f"{module}.qzeros holds the zero point {other} although 'sym' is true, which makes all of them "
                    f"{self._middle}; correct 'sym' or 'checkpoint_format' in config.json"
                )
        elif (points > 2 * self._middle - 1).any():
            # AutoGPTQ's PyTorch code reads 2^bits there, the ExLlama kernels 0: the checkpoint has no one meaning.
            raise UnsupportedError(
                f"{module}.qzeros holds a zero point of {2 * self._middle}, which programs read as that or as 0; use "
                "the checkpoint_format gptq_v2, or quantize the original checkpoint with --quantize"
            )

    def weight(self, parts: Parts, rows: int, columns: int) -> QuantizedWeight:
        dtype = CODE_DTYPES[self.weight_format]
        # uint4 codes stay as they are; signed ones are moved down by the middle, and so are their zero points.
        offset = 0 if self.weight_format == "uint4" else -self._middle
        codes = unpack(weights.transpose(parts["qweight"]), self._code_bits, dtype, add=offset)
        points = None
        if not self._symmetric:
            add = self._stored_less + offset
            points = weights.transpose(unpack(parts["qzeros"], self._code_bits, dtype, add=add))
        scales = float32(weights.transpose(parts["scales"]))
        return QuantizedWeight(codes, scales, points, self._group_size or columns)

    def _zero_points(self, stored: ir.ExternalTensor) -> Array:
        octets = small(stored).reshape(-1).view(np.uint8)
        fields: Array = octets if self._code_bits == 8 else np.concatenate([octets & 15, octets >> 4])
        points: Array = fields.astype(np.int16) + self._stored_less
        return points
