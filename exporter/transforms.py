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
class Cast(Transform):
    """Values converted to another floating-point dtype, rounding to nearest even as torch does."""

    to: ir.DataType

    def shape(self, sources: Sequence[Dims]) -> Dims:
        return sources[0]

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        return self.to

    def apply(self, sources: Sequence[Array]) -> Array:
        return cast_array(sources[0], self.to)


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
    if target.itemsize < array.dtype.itemsize or to == ir.DataType.FLOAT16:
        infinite = np.isinf(result)
        if infinite.any() and not np.isinf(array[infinite]).all():
            raise OverflowError(f"values beyond the range of {to.name}")
    return result
