"""How one initializer is made from others: the pure, array-level half of the weight plan.

Each transform is a frozen value with three duties: the shape and dtype of its result (known before any byte is
read) and the result itself, as a view of its sources wherever numpy allows one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]
Dims = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """One step of a weight plan; ``sources`` below are the shapes, dtypes or arrays it is applied to."""

    def shape(self, sources: Sequence[Dims]) -> Dims:
        """Shape of the result; raises ValueError when the sources do not fit."""
        raise NotImplementedError

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        """Dtype of the result; raises ValueError when the sources' dtypes differ."""
        if len(set(sources)) != 1:
            raise ValueError(f"{type(self).__name__} of different dtypes: {', '.join(d.name for d in sources)}")
        return sources[0]

    def apply(self, sources: Sequence[Array]) -> Array:
        """The result, a view of the sources where possible."""
        raise NotImplementedError


@dataclass(frozen=True)
class Transpose(Transform):
    """Axes permuted: result axis i is source axis ``perm[i]``."""

    perm: Dims

    def shape(self, sources: Sequence[Dims]) -> Dims:
        (source,) = sources
        if sorted(self.perm) != list(range(len(source))):
            raise ValueError(f"permutation {list(self.perm)} does not fit shape {list(source)}")
        return tuple(source[axis] for axis in self.perm)

    def apply(self, sources: Sequence[Array]) -> Array:
        transposed: Array = sources[0].transpose(self.perm)
        return transposed


@dataclass(frozen=True)
class Concat(Transform):
    """Sources joined along an existing axis."""

    axis: int

    def shape(self, sources: Sequence[Dims]) -> Dims:
        first = sources[0]
        if not 0 <= self.axis < len(first):
            raise ValueError(f"concat axis {self.axis} is outside shape {list(first)}")
        rest = {source[: self.axis] + source[self.axis + 1 :] for source in sources}
        if len(rest) != 1 or len({len(source) for source in sources}) != 1:
            raise ValueError(f"cannot concatenate {[list(s) for s in sources]} on axis {self.axis}")
        return (*first[: self.axis], sum(source[self.axis] for source in sources), *first[self.axis + 1 :])

    def apply(self, sources: Sequence[Array]) -> Array:
        return np.concatenate(sources, axis=self.axis)


@dataclass(frozen=True)
class Stack(Transform):
    """Sources of one shape joined along a new axis."""

    axis: int

    def shape(self, sources: Sequence[Dims]) -> Dims:
        first = sources[0]
        if len(set(sources)) != 1:
            raise ValueError(f"cannot stack different shapes {[list(s) for s in sources]}")
        if not 0 <= self.axis <= len(first):
            raise ValueError(f"stack axis {self.axis} is outside shape {list(first)}")
        return (*first[: self.axis], len(sources), *first[self.axis :])

    def apply(self, sources: Sequence[Array]) -> Array:
        return np.stack(sources, axis=self.axis)


@dataclass(frozen=True)
class Reshape(Transform):
    """The same elements in row-major order under another shape."""

    dims: Dims

    def shape(self, sources: Sequence[Dims]) -> Dims:
        (source,) = sources
        if math.prod(source) != math.prod(self.dims):
            raise ValueError(f"cannot reshape {list(source)} to {list(self.dims)}")
        return self.dims

    def apply(self, sources: Sequence[Array]) -> Array:
        return sources[0].reshape(self.dims)


@dataclass(frozen=True)
class Slice(Transform):
    """Elements ``start`` to ``end`` (exclusive) of one axis."""

    axis: int
    start: int
    end: int

    def shape(self, sources: Sequence[Dims]) -> Dims:
        (source,) = sources
        if not 0 <= self.axis < len(source) or not 0 <= self.start <= self.end <= source[self.axis]:
            raise ValueError(f"slice {self.start}:{self.end} of axis {self.axis} is outside shape {list(source)}")
        return (*source[: self.axis], self.end - self.start, *source[self.axis + 1 :])

    def apply(self, sources: Sequence[Array]) -> Array:
        return sources[0][(slice(None),) * self.axis + (slice(self.start, self.end),)]


@dataclass(frozen=True)
class Interleave(Transform):
    """The two halves of an axis alternated, ``block`` elements at a time: with 1, a0..an b0..bn -> a0 b0 .. an bn."""

    axis: int
    block: int = 1

    def shape(self, sources: Sequence[Dims]) -> Dims:
        (source,) = sources
        if not 0 <= self.axis < len(source) or source[self.axis] % (2 * self.block):
            raise ValueError(f"cannot interleave the halves of axis {self.axis} of shape {list(source)}")
        return source

    def apply(self, sources: Sequence[Array]) -> Array:
        (source,) = sources
        split = source.reshape(*source.shape[: self.axis], 2, -1, self.block, *source.shape[self.axis + 1 :])
        alternated: Array = split.swapaxes(self.axis, self.axis + 1).reshape(source.shape)
        return alternated


@dataclass(frozen=True)
class RepeatRows(Transform):
    """Row i of the ``rows`` rows of the result is row i // ``times`` of the source."""

    times: int
    rows: int

    def shape(self, sources: Sequence[Dims]) -> Dims:
        (source,) = sources
        if source[0] != -(-self.rows // self.times):
            raise ValueError(f"{source[0]} rows repeated {self.times} times do not make {self.rows}")
        return (self.rows, *source[1:])

    def apply(self, sources: Sequence[Array]) -> Array:
        (source,) = sources
        if len(source) == 1:
            return np.broadcast_to(source, (self.rows, *source.shape[1:]))
        return np.repeat(source, self.times, axis=0)[: self.rows]


@dataclass(frozen=True)
class Cast(Transform):
    """Values converted to another floating-point dtype, rounding to nearest even as torch does."""

    to: ir.DataType

    def shape(self, sources: Sequence[Dims]) -> Dims:
        return sources[0]

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        return self.to

    def apply(self, sources: Sequence[Array]) -> Array:
        return cast_array(sources[0], self.to)


@dataclass(frozen=True)
class RowWise(Transform):
    """A computation of each row from the same rows of its sources, so that it streams in blocks of axis 0.

    A source whose axis 0 is 1 where the result's is not belongs to every row.
    """


@dataclass(frozen=True)
class Multiply(RowWise):
    """Two float32 sources multiplied, the second one broadcast over the first."""

    def shape(self, sources: Sequence[Dims]) -> Dims:
        first, second = sources
        if len(first) != len(second) or any(b not in (1, a) for a, b in zip(first, second, strict=True)):
            raise ValueError(f"cannot multiply {list(first)} by {list(second)}")
        return first

    def apply(self, sources: Sequence[Array]) -> Array:
        product: Array = sources[0] * sources[1]
        return product


@dataclass(frozen=True)
class Quantize(RowWise):
    """float32 [..., N, K] and scales [..., N, G], and zero points if there are three sources, to codes [..., N, K].

    code = saturate(round_half_to_even(value / scale) + zero_point), of FP8 saturate(value / scale) rounded by its cast.
    """

    to: ir.DataType
    group_size: int

    def shape(self, sources: Sequence[Dims]) -> Dims:
        return _grouped_shape(sources, self.group_size)

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        return self.to

    def apply(self, sources: Sequence[Array]) -> Array:
        weight, scales, *points = sources
        if not np.isfinite(weight).all():
            raise ValueError("a value that is not finite")
        scaled = weight / spread_groups(scales, self.group_size, weight.shape[-1])
        low, high = CODE_RANGES[self.to]
        if self.to != ir.DataType.FLOAT8E4M3FN:
            scaled = np.rint(scaled)
            if points:
                scaled += spread_groups(points[0].astype(np.float32), self.group_size, weight.shape[-1])
        codes: Array = np.clip(scaled, low, high).astype(self.to.numpy())
        return codes


@dataclass(frozen=True)
class Dequantize(RowWise):
    """Codes [..., N, K] and scales [..., N, G], and zero points if there are three sources, to float32 [..., N, K]."""

    group_size: int

    def shape(self, sources: Sequence[Dims]) -> Dims:
        return _grouped_shape(sources, self.group_size)

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        return ir.DataType.FLOAT

    def apply(self, sources: Sequence[Array]) -> Array:
        codes, scales, *points = sources
        values = codes.astype(np.float32)
        if points:
            values -= spread_groups(points[0].astype(np.float32), self.group_size, codes.shape[-1])
        values *= spread_groups(scales, self.group_size, codes.shape[-1])
        return values


@dataclass(frozen=True)
class RoundScales(RowWise):
    """float32 scales rounded to what dtype ``to`` can hold, still float32; one that would become 0 is the least."""

    to: ir.DataType

    def shape(self, sources: Sequence[Dims]) -> Dims:
        return sources[0]

    def apply(self, sources: Sequence[Array]) -> Array:
        (scales,) = sources
        if not np.isfinite(scales).all() or (scales <= 0).any():
            raise ValueError("a scale that is not a positive number")
        least = np.float32(smallest(self.to))
        rounded: Array = np.maximum(cast_array(scales, self.to).astype(np.float32), least)
        return rounded


CODE_RANGES = {
    ir.DataType.INT8: (-127, 127),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.FLOAT8E4M3FN: (-448, 448),
}
"""The numbers that codes use, by dtype; INT8 leaves out -128 to be symmetric."""


def smallest(dtype: ir.DataType) -> float:
    """The smallest positive number of a floating-point ``dtype``."""
    return float(ml_dtypes.finfo(dtype.numpy()).smallest_subnormal)  # type: ignore[no-untyped-call]


def spread_groups(groups: Array, group_size: int, columns: int) -> Array:
    """[..., G] repeated to [..., columns]; a view where one group is the whole row."""
    if groups.shape[-1] == 1:
        return groups
    return np.repeat(groups, group_size, axis=-1)[..., :columns]


def _grouped_shape(sources: Sequence[Dims], group_size: int) -> Dims:
    first, *grouped = sources
    expected = (*first[:-1], -(-first[-1] // group_size))
    if any(source != expected for source in grouped):
        raise ValueError(f"scales {[list(source) for source in grouped]} are not {list(expected)}")
    return first


def cast_array(array: Array, to: ir.DataType) -> Array:
    """``array`` as dtype ``to``; raises OverflowError when a finite value becomes infinite."""
    target = to.numpy()
    if array.dtype == target:
        return array
    if array.dtype == ml_dtypes.bfloat16 and target == np.float32:
        # bfloat16 is the upper half of float32; shifting is several times faster than a conversion.
        widened = np.ascontiguousarray(array).view(np.uint16).astype(np.uint32)
        widened <<= 16
        return widened.view(np.float32)
    with np.errstate(over="ignore"):
        result = array.astype(target)
    if to.is_floating_point() and (target.itemsize < array.dtype.itemsize or to == ir.DataType.FLOAT16):
        infinite = np.isinf(result)
        if infinite.any() and not np.isinf(array[infinite]).all():
            raise OverflowError(f"values beyond the range of {to.name}")
    return result
