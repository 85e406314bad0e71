"""Quantized matrices in blocks of unsigned codes, two 4-bit codes a byte: what ``com.microsoft``'s kernels read.

``MatMulNBits``, ``QMoE`` and ``GatherBlockQuantized`` divide every row of a matrix [..., N, K] into blocks of a power
of two columns, store codes of 0..15 or 0..255 around a zero point of 8 or 128 where none is given, and fill up the last
block. A group of columns that share a scale becomes one block or several with that scale, so that the numbers are those
of the quantized matrix exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.quantized_weights import QuantizedWeight, quantize
from qwenforge.exporter.scale_rounding import half_scales
from qwenforge.exporter.transforms import Array, Concat, Dims, RowWise, Stack
from qwenforge.exporter.weights import DerivedTensor, dims

SMALLEST_BLOCK = 16
LARGEST_BLOCK = 128
"""Larger ones take no less time, and the sums of their int8 activations are less exact."""

Bits = Literal[4, 8]
_BITS: dict[ir.DataType, Bits] = {ir.DataType.INT8: 8, ir.DataType.INT4: 4, ir.DataType.UINT4: 4}


@dataclass(frozen=True)
class BlockWeight:
    """A matrix [..., N, K] in blocks; B is ceil(K / block_size).

    Attributes:
        codes: [..., N, B * block_size * bits / 8] uint8.
        scales: [..., N, B] float32.
        zero_points: [..., N, ceil(B * bits / 8)] uint8; None where all are 2^(bits - 1).
        block_size: columns of a block, a power of two.
        bits: of a code, 4 or 8.
    """

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None
    block_size: int
    bits: Bits


@dataclass(frozen=True)
class UnsignedCodes(RowWise):
    """INT8, INT4 or UINT4 codes [..., K] to uint8 [..., K'], K' = ceil(K / multiple) * multiple * bits / 8.

    Signed codes are moved up by 2^(bits - 1), filling codes are that number, and of two 4-bit codes in a byte the first
    one is in the low half.
    """

    bits: Bits
    multiple: int

    def shape(self, sources: Sequence[Dims]) -> Dims:
        (source,) = sources
        return (*source[:-1], -(-source[-1] // self.multiple) * self.multiple * self.bits // 8)

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        if sources[0] not in _BITS or _BITS[sources[0]] != self.bits:
            raise ValueError(f"{sources[0].name} is not a number of {self.bits} bits")
        return ir.DataType.UINT8

    def apply(self, sources: Sequence[Array]) -> Array:
        (codes,) = sources
        middle = 1 << (self.bits - 1)
        wide = codes.astype(np.int16) + (0 if codes.dtype == ir.DataType.UINT4.numpy() else middle)
        missing = -codes.shape[-1] % self.multiple
        if missing:
            wide = np.pad(wide, [(0, 0)] * (codes.ndim - 1) + [(0, missing)], constant_values=middle)
        unsigned = wide.astype(np.uint8)
        if self.bits == 8:
            return unsigned
        packed: Array = unsigned[..., 0::2] | unsigned[..., 1::2] << 4
        return packed


@dataclass(frozen=True)
class RepeatGroups(RowWise):
    """Numbers of groups [..., G] to numbers of blocks [..., B]: block b lies in group b * block_size // group_size."""

    group_size: int
    block_size: int
    blocks: int

    def shape(self, sources: Sequence[Dims]) -> Dims:
        (source,) = sources
        if source[-1] * self.group_size <= (self.blocks - 1) * self.block_size:
            raise ValueError(f"{source[-1]} groups of {self.group_size} do not reach block {self.blocks}")
        return (*source[:-1], self.blocks)

    def apply(self, sources: Sequence[Array]) -> Array:
        repeated: Array = sources[0][..., np.arange(self.blocks) * self.block_size // self.group_size]
        return repeated


@dataclass(frozen=True)
class LargestScales(RowWise):
    """float32 [..., N, K] to the scales [..., N, G] with which codes up to ``largest`` reach each group's largest one.

    A group of zeros only has the scale 1. Scales are numbers that float16 has.
    """

    group_size: int
    largest: int

    def shape(self, sources: Sequence[Dims]) -> Dims:
        (source,) = sources
        return (*source[:-1], -(-source[-1] // self.group_size))

    def apply(self, sources: Sequence[Array]) -> Array:
        magnitudes = np.abs(sources[0])
        starts = np.arange(0, magnitudes.shape[-1], self.group_size)
        largest = np.maximum.reduceat(magnitudes, starts, axis=-1).astype(np.float32)
        return half_scales(np.where(largest > 0, largest / np.float32(self.largest), np.float32(1)))


def rounded(weight: ir.TensorProtocol, weight_format: Literal["int8", "int4"], group_size: int) -> QuantizedWeight:
    """``weight`` [..., N, K] rounded to the nearest code of a symmetric grid that ends at each group's largest one."""
    wide = weights.cast(weight, ir.DataType.FLOAT)
    scales = DerivedTensor(LargestScales(group_size, 127 if weight_format == "int8" else 7), [wide])
    return quantize(wide, weight_format, scales, group_size=group_size)


def block_size(quantized: QuantizedWeight, *, divides: Sequence[int] = ()) -> int | None:
    """The largest block that divides the groups and every number of ``divides``; None where no block does.

    Where one group is the whole row, blocks need not divide it: the one that fills up the fewest columns is taken.
    """
    columns = dims(quantized.codes)[-1]
    sizes = [size for size in (LARGEST_BLOCK, 64, 32, SMALLEST_BLOCK) if all(number % size == 0 for number in divides)]
    if quantized.group_size < columns:
        return next((size for size in sizes if quantized.group_size % size == 0), None)
    return min(sizes, key=lambda size: (-(-columns // size) * size, -size), default=None)


def in_blocks(quantized: QuantizedWeight, size: int) -> BlockWeight:
    """``quantized`` in blocks of ``size``, lazy; raises ValueError for a format that is not of 4 or 8 bit integers."""
    if quantized.codes.dtype not in _BITS:
        raise ValueError(f"{quantized.format} weights have no blocks of integers")
    bits = _BITS[quantized.codes.dtype]
    blocks = -(-dims(quantized.codes)[-1] // size)
    spread = RepeatGroups(quantized.group_size, size, blocks)
    points = quantized.zero_points
    return BlockWeight(
        codes=_each_matrix(UnsignedCodes(bits, size), quantized.codes),
        scales=_each_matrix(spread, quantized.scales),
        zero_points=None
        if points is None
        else _each_matrix(UnsignedCodes(bits, 8 // bits), _each_matrix(spread, points)),
        block_size=size,
        bits=bits,
    )


def _each_matrix(transform: RowWise, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """``transform`` of ``tensor``, below joins of axis 0, so that one joined part after the other is computed."""
    if isinstance(tensor, DerivedTensor):
        match tensor.transform:
            case Stack(0) if len(dims(tensor)) > 2:
                return weights.stack([_each_matrix(transform, source) for source in tensor.sources], 0)
            case Concat(0) if len(dims(tensor)) > 1:
                return weights.concat([_each_matrix(transform, source) for source in tensor.sources], 0)
    return DerivedTensor(transform, [tensor])
