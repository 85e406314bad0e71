"""AWQ checkpoints in AutoAWQ's ``gemm`` version.

A matrix [N, K] is stored transposed; a word holds 8 consecutive output channels, which are interleaved: channel j is in
the 4-bit field (0, 4, 1, 5, 2, 6, 3, 7)[j].

==========  ==================  ====================================================
tensor      shape, dtype        meaning
==========  ==================  ====================================================
qweight     [K, N / 8] int32    unsigned codes
qzeros      [G, N / 8] int32    zero points, packed alike
scales      [G, N] float        value = (code - zero point) * scale
==========  ==================  ====================================================

Source: AutoAWQ 0.2.9's ``awq/utils/packing_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.prequantized.format import FLOATS, Format, Part, Parts, Settings, float32, groups
from qwenforge.exporter.prequantized.unpack import WORD_BITS, unpack
from qwenforge.exporter.quantized_weights import QuantizedWeight

_BITS = 4
_PACKED = WORD_BITS // _BITS
_FIELD_OF_CHANNEL = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQ(Format):
    """4-bit weights with zero points."""

    method = "awq"
    markers = ("qweight", "qzeros", "scales")
    weight_format = "uint4"

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Read ``quantization_config``; raises UnsupportedError when a field asks for something else."""
        settings = Settings(values, where)
        self.where = where
        settings.choice("bits", (_BITS,), values.get("w_bit"))
        settings.choice("version", ("gemm", "GEMM"), "gemm")
        settings.choice("zero_point", (True,), True)
        self._group_size = settings.group_size()
        self.bits = _BITS + (20.0 / self._group_size if self._group_size else 0.0)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        if rows % _PACKED:
            raise self.refuse(f"a matrix of {rows} x {columns} cannot be packed {_PACKED} output channels a word")
        count = groups(columns, self._group_size or columns)
        return {
            "qweight": Part(((columns, rows // _PACKED),), ("I32",)),
            "qzeros": Part(((count, rows // _PACKED),), ("I32",)),
            "scales": Part(((count, rows),), FLOATS),
        }

    def weight(self, parts: Parts, rows: int, columns: int) -> QuantizedWeight:
        codes, points = (
            unpack(
                weights.transpose(parts[name]),
                _BITS,
                ir.DataType.UINT4,
                order=_FIELD_OF_CHANNEL,
                across_rows=True,
            )
            for name in ("qweight", "qzeros")
        )
        scales = float32(weights.transpose(parts["scales"]))
        return QuantizedWeight(codes, scales, points, self._group_size or columns)
