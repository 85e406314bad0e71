"""Quantized matrices inside a weight plan: integers or FP8 numbers, times scales, as lazy as any other weight.

A quantized weight enters a plan as a dequantization of its codes, so that every rule that concatenates, stacks, slices
or interleaves weights works on it unchanged; :func:`as_quantized` finds the codes and the scales again behind such
steps, and a lowering stores those. Codes come from :func:`quantize` (of a floating-point weight and given scales) or
from a checkpoint that was quantized already.

Everywhere a matrix is [..., N, K]: N rows, the output channels, and K columns, over which a product sums.

    value = (code - zero_point) * scale
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.transforms import Cast, Concat, Dequantize, Interleave, Quantize, Slice, Stack
from qwenforge.exporter.weights import DerivedTensor, dims

WeightFormat = Literal["int8", "int4", "uint4", "fp8"]

CODE_DTYPES: dict[WeightFormat, ir.DataType] = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "uint4": ir.DataType.UINT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix as it is stored.

    Attributes:
        codes: [..., N, K], INT8, INT4, UINT4 or FLOAT8E4M3FN.
        scales: [..., N, G] float32, G = ceil(K / group_size).
        zero_points: [..., N, G] of the codes' dtype; None where they are all 0.
        group_size: columns of a row that share a scale; K where a whole row does.
    """

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None
    group_size: int

    def __post_init__(self) -> None:
        shape = dims(self.codes)
        groups = (*shape[:-1], -(-shape[-1] // self.group_size))
        if dims(self.scales) != groups or (self.zero_points is not None and dims(self.zero_points) != groups):
            raise ValueError(f"scales {dims(self.scales)} do not fit codes {shape} in groups of {self.group_size}")

    @property
    def format(self) -> WeightFormat:
        """The codes' number format."""
        return next(name for name, dtype in CODE_DTYPES.items() if dtype == self.codes.dtype)

    def dequantized(self, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.TensorProtocol:
        """The matrix as a lazy tensor [..., N, K] of ``dtype``; computed in float32 and then rounded."""
        sources = [self.codes, self.scales] + ([self.zero_points] if self.zero_points is not None else [])
        return weights.cast(DerivedTensor(Dequantize(self.group_size), sources), dtype)


def quantize(
    weight: ir.TensorProtocol,
    weight_format: WeightFormat,
    scales: ir.TensorProtocol,
    *,
    group_size: int,
    zero_points: ir.TensorProtocol | None = None,
) -> QuantizedWeight:
    """``weight`` [..., N, K] rounded to the nearest codes, ties to even, with the given ``scales`` [..., N, G].

    INT8 uses -127..127, INT4 -8..7, UINT4 0..15 and FP8 -448..448; values beyond them saturate. Reading the codes
    raises UserError when a weight is not finite.
    """
    wide = weights.cast(weight, ir.DataType.FLOAT)
    sources = [wide, scales] + ([zero_points] if zero_points is not None else [])
    codes = DerivedTensor(Quantize(CODE_DTYPES[weight_format], group_size), sources)
    return QuantizedWeight(codes, scales, zero_points, group_size)


def as_quantized(tensor: ir.TensorProtocol) -> QuantizedWeight | None:
    """The codes and scales behind a plan [..., N, K]; None unless its every element is of one quantized format.

    Sees through casts, and through concatenation, stacking, slicing and interleaving of rows or whole matrices. A
    matrix that a MatMul takes, [K, N], is given as ``weights.transpose(tensor, (1, 0))``.
    """
    if not isinstance(tensor, DerivedTensor):
        return None
    transform = tensor.transform
    if isinstance(transform, Dequantize):
        codes, scales, *rest = tensor.sources
        return QuantizedWeight(codes, scales, rest[0] if rest else None, transform.group_size)
    parts = [as_quantized(source) for source in tensor.sources]
    found = [part for part in parts if part is not None]
    if len(found) != len(parts) or len({(part.codes.dtype, part.group_size) for part in found}) != 1:
        return None
    if len({part.zero_points is None for part in found}) != 1:
        return None
    rank, first = len(dims(tensor)), found[0]
    match transform:
        case Cast():
            return first
        case Concat(axis) if axis < rank - 1:
            return _joined(found, lambda tensors: weights.concat(tensors, axis))
        case Stack(0):
            return _joined(found, lambda tensors: weights.stack(tensors, 0))
        case Slice(axis, start, end) if axis < rank - 1:
            return _joined(found, lambda tensors: weights.slice_(tensors[0], axis, start, end))
        case Interleave(axis, block) if axis == rank - 2:
            return _joined(found, lambda tensors: weights.interleave_rows(tensors[0], block))
        case _:
            return None


def _joined(
    parts: Sequence[QuantizedWeight], join: Callable[[Sequence[ir.TensorProtocol]], ir.TensorProtocol]
) -> QuantizedWeight:
    points = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedWeight(
        join([part.codes for part in parts]),
        join([part.scales for part in parts]),
        join(points) if points else None,
        parts[0].group_size,
    )
