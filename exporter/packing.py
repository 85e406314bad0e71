"""Codes of quantized matrices in the column orders of ``QwenForgeMoE`` (layout version 1), as steps of a weight plan.

plugins/moe/README.md describes the layouts: what each lane of a matrix instruction wants stands together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwenforge.exporter.transforms import Array, Dims, RowWise

BYTE_COLUMNS = np.array([2 * lane + offset for lane in range(4) for offset in (0, 1, 8, 9)])
"""Columns of a block of 16 in the order of their bytes: lane t of a matrix instruction wants 2t, 2t + 1, 2t + 8 and
2t + 9."""
NIBBLE_COLUMNS = np.array(
    [16 * (pair // 2) + 8 * (pair % 2) + 2 * lane + side for lane in range(4) for side in range(2) for pair in range(4)]
)
"""Columns of a block of 32 in the order of their nibbles, low ones first, by lane alike."""


@dataclass(frozen=True)
class PackInt8(RowWise):
    """INT8 codes [..., K] plus 128 as bytes, in blocks of 16 columns by lane; the bytes are typed INT8."""

    def shape(self, sources: Sequence[Dims]) -> Dims:
        return _blocked(sources[0], 16)

    def apply(self, sources: Sequence[Array]) -> Array:
        (codes,) = sources
        blocks = codes.reshape(*codes.shape[:-1], -1, 16)[..., BYTE_COLUMNS]
        packed: Array = (blocks.view(np.uint8) ^ 128).reshape(codes.shape).view(np.int8)
        return packed


@dataclass(frozen=True)
class PackInt4(RowWise):
    """INT4 codes [..., K] plus 8, two a byte [..., K / 2], in blocks of 32 columns by lane; typed INT8."""

    def shape(self, sources: Sequence[Dims]) -> Dims:
        *lead, columns = _blocked(sources[0], 32)
        return (*lead, columns // 2)

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        return ir.DataType.INT8

    def apply(self, sources: Sequence[Array]) -> Array:
        (codes,) = sources
        blocks = codes.astype(np.int8).reshape(*codes.shape[:-1], -1, 32)[..., NIBBLE_COLUMNS]
        nibbles = (blocks + 8).view(np.uint8)
        packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
        typed: Array = packed.reshape(*codes.shape[:-1], -1).view(np.int8)
        return typed


@dataclass(frozen=True)
class AsBytes(RowWise):
    """FP8 numbers as the INT8 of the same bits."""

    def shape(self, sources: Sequence[Dims]) -> Dims:
        return sources[0]

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        return ir.DataType.INT8

    def apply(self, sources: Sequence[Array]) -> Array:
        raw: Array = np.ascontiguousarray(sources[0]).view(np.int8)
        return raw


def _blocked(shape: Dims, block: int) -> Dims:
    if shape[-1] % block:
        raise ValueError(f"{shape[-1]} columns are not whole blocks of {block}")
    return shape
