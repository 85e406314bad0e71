"""The weight plan: initializers as expressions over checkpoint tensors, evaluated only when their bytes are asked for.

A plan's leaves are any onnx_ir tensors, for a checkpoint ``ir.ExternalTensor``s that point into a ``.safetensors``
file. Its inner nodes are :class:`DerivedTensor`s. Passes compose plans with the functions below (:func:`transpose`,
:func:`concat`, :func:`cast`...), which keep them in a form that streams: transposes move towards the leaves,
where they are views of a mapped file, and casts towards the root, where they convert one block at a time.
:func:`chunks` then yields a tensor's bytes in bounded pieces, whatever the size of the model;
``external_data.save_model`` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qwenforge.errors import UserError
from qwenforge.exporter.leaves import leaf_key, mapped_array, read_blocks, read_bytes
from qwenforge.exporter.transforms import (
    Array,
    Cast,
    Concat,
    Dims,
    Interleave,
    Multiply,
    RepeatRows,
    Reshape,
    RowWise,
    Slice,
    Stack,
    Transform,
    Transpose,
    cast_array,
)

BLOCK_BYTES = 4 << 20
"""Upper bound on one streamed piece, before a cast widens it."""

_EXACT_WIDENINGS = frozenset(
    {
        (ir.DataType.BFLOAT16, ir.DataType.FLOAT),
        (ir.DataType.FLOAT16, ir.DataType.FLOAT),
        (ir.DataType.BFLOAT16, ir.DataType.DOUBLE),
        (ir.DataType.FLOAT16, ir.DataType.DOUBLE),
        (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    }
)


class DerivedTensor(ir.TensorProtocol):
    """A tensor described by a transform of other tensors; nothing is read or kept until its values are asked for.

    Build one with this module's functions rather than directly: they simplify.

    Attributes:
        sources: The tensors the transform is applied to.
        transform: What is done to them.
    """

    whole: ClassVar[bool] = False
    """Whether :func:`substitute` takes it for a leaf, whatever it is made of."""

    def __init__(self, transform: Transform, sources: Sequence[ir.TensorProtocol], *, name: str | None = None) -> None:
        """Infer shape and dtype; raises ValueError when the sources do not fit the transform."""
        if not sources:
            raise ValueError(f"{type(transform).__name__} of no tensors")
        self.transform = transform
        self.sources: tuple[ir.TensorProtocol, ...] = tuple(sources)
        self.name = name
        self.shape = ir.Shape(transform.shape([dims(source) for source in sources]), frozen=True)
        self.dtype = transform.dtype([source.dtype for source in sources])
        self.doc_string = None
        self.raw: Transform = transform
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, Any] = {}

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(dims(self))

    @property
    def nbytes(self) -> int:
        """Number of bytes of the result."""
        return math.ceil(self.size * self.dtype.itemsize)

    def numpy(self) -> Array:
        """Evaluate into a new array; peak memory is the result, one block and what :func:`chunks` says."""
        result = np.empty(math.prod(dims(self)), dtype=self.dtype.numpy())
        start = 0
        for block in _blocks(self):
            result[start : start + block.size] = block
            start += block.size
        return result.reshape(dims(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a derived tensor is computed: it has no array to share")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.numpy().__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def tobytes(self) -> bytes:
        """The little-endian bytes of the result, in memory at once; prefer :func:`chunks` or :meth:`tofile`."""
        return b"".join(chunks(self))

    def tofile(self, file: Any) -> None:
        """Write the bytes of the result block by block."""
        for chunk in chunks(self):
            file.write(chunk)

    def __repr__(self) -> str:
        return (
            f"DerivedTensor<{self.dtype.name},{list(dims(self))}>({self.transform!r}, "
            f"{len(self.sources)} sources, name={self.name!r})"
        )


def dims(tensor: ir.TensorProtocol) -> Dims:
    """A tensor's static shape as integers."""
    return tuple(tensor.shape.numpy())


def transpose(tensor: ir.TensorProtocol, perm: Sequence[int] | None = None) -> ir.TensorProtocol:
    """``tensor`` with its axes permuted (reversed when ``perm`` is None)."""
    order = tuple(perm) if perm is not None else tuple(reversed(range(len(dims(tensor)))))
    shape = Transpose(order).shape([dims(tensor)])
    if order == tuple(range(len(order))):
        return tensor
    if isinstance(tensor, DerivedTensor):
        inner = tensor.transform
        if isinstance(inner, Transpose):
            return transpose(tensor.sources[0], tuple(inner.perm[axis] for axis in order))
        if isinstance(inner, Cast):
            return cast(transpose(tensor.sources[0], order), inner.to)
        if isinstance(inner, Concat):
            return concat([transpose(source, order) for source in tensor.sources], order.index(inner.axis))
        if isinstance(inner, Stack) and inner.axis == 0 and order[0] == 0:
            return stack([transpose(source, [axis - 1 for axis in order[1:]]) for source in tensor.sources], 0)
    moved = [axis for axis in order if dims(tensor)[axis] != 1]
    if moved == sorted(moved):  # only axes of size 1 change places: the bytes stay where they are
        return reshape(tensor, shape)
    return DerivedTensor(Transpose(order), [tensor])


def concat(tensors: Sequence[ir.TensorProtocol], axis: int) -> ir.TensorProtocol:
    """``tensors`` joined along an existing axis (negative counts from the end).

    Tensors of different floating-point dtypes are widened to float32, which is exact.
    """
    if len(tensors) == 1:
        return tensors[0]
    axis %= len(dims(tensors[0]))
    return _hoist_cast(_alike(tensors), lambda sources: DerivedTensor(Concat(axis), sources))


def stack(tensors: Sequence[ir.TensorProtocol], axis: int = 0) -> ir.TensorProtocol:
    """``tensors`` of one shape joined along a new axis; dtypes as for :func:`concat`."""
    axis %= len(dims(tensors[0])) + 1
    return _hoist_cast(_alike(tensors), lambda sources: DerivedTensor(Stack(axis), sources))


def reshape(tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.TensorProtocol:
    """``tensor`` under another shape of as many elements; every dimension is given (no -1)."""
    target = tuple(shape)
    if target == dims(tensor):
        return tensor
    if isinstance(tensor, DerivedTensor):
        if isinstance(tensor.transform, Reshape):
            return reshape(tensor.sources[0], target)
        if isinstance(tensor.transform, Cast):
            return cast(reshape(tensor.sources[0], target), tensor.transform.to)
    return DerivedTensor(Reshape(target), [tensor])


def slice_(tensor: ir.TensorProtocol, axis: int, start: int, end: int) -> ir.TensorProtocol:
    """Elements ``start`` to ``end`` (exclusive) of one axis."""
    axis %= len(dims(tensor))
    shape = Slice(axis, start, end).shape([dims(tensor)])
    if shape == dims(tensor):
        return tensor
    if isinstance(tensor, DerivedTensor):
        inner = tensor.transform
        if isinstance(inner, Cast):
            return cast(slice_(tensor.sources[0], axis, start, end), inner.to)
        if isinstance(inner, Slice) and inner.axis == axis:
            return slice_(tensor.sources[0], axis, inner.start + start, inner.start + end)
        if isinstance(inner, Transpose):
            return transpose(slice_(tensor.sources[0], inner.perm[axis], start, end), inner.perm)
        if isinstance(inner, Concat) and inner.axis == axis and start < end:
            return concat(list(_slice_parts(tensor.sources, axis, start, end)), axis)
        if isinstance(inner, Concat):
            return concat([slice_(source, axis, start, end) for source in tensor.sources], inner.axis)
        if isinstance(inner, Stack) and inner.axis == 0 and start < end:
            if axis == 0:
                return stack(tensor.sources[start:end], 0)
            return stack([slice_(source, axis - 1, start, end) for source in tensor.sources], 0)
    return DerivedTensor(Slice(axis, start, end), [tensor])


def interleave_rows(tensor: ir.TensorProtocol, block: int = 1) -> ir.TensorProtocol:
    """The two halves of the next-to-last axis alternated: [.., 2I, C] gate rows then up rows -> gate 0, up 0, gate 1...

    With ``block`` 1 this is the row order ONNX Runtime's MoE wants for fused SwiGLU weights; with 8, 8 rows of the gate
    and the 8 of up that belong to them take turns, as in the packed weights of our own plugin.
    """
    axis = len(dims(tensor)) - 2
    if isinstance(tensor, DerivedTensor):
        if isinstance(tensor.transform, Cast):
            return cast(interleave_rows(tensor.sources[0], block), tensor.transform.to)
        if isinstance(tensor.transform, Stack) and tensor.transform.axis == 0 and axis >= 1:
            return stack([interleave_rows(source, block) for source in tensor.sources], 0)
    return DerivedTensor(Interleave(axis, block), [tensor])


def cast(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """``tensor`` converted to ``dtype``; reading it raises UserError when a finite value would become infinite."""
    if tensor.dtype == dtype:
        return tensor
    if isinstance(tensor, DerivedTensor) and isinstance(tensor.transform, Cast):
        (source,) = tensor.sources
        if (source.dtype, tensor.dtype) in _EXACT_WIDENINGS:
            return cast(source, dtype)
    return DerivedTensor(Cast(dtype), [tensor])


def multiply(tensor: ir.TensorProtocol, factors: ir.TensorProtocol) -> ir.TensorProtocol:
    """``tensor`` times ``factors`` broadcast over it, of the same rank, computed and given in float32."""
    return DerivedTensor(Multiply(), [cast(tensor, ir.DataType.FLOAT), cast(factors, ir.DataType.FLOAT)])


def leaves(tensor: ir.TensorProtocol) -> Iterator[ir.TensorProtocol]:
    """The tensors a plan reads, in order, repeats included; a plain tensor is its own leaf."""
    if isinstance(tensor, DerivedTensor):
        for source in tensor.sources:
            yield from leaves(source)
    else:
        yield tensor


def substitute(
    tensor: ir.TensorProtocol, function: Callable[[ir.TensorProtocol], ir.TensorProtocol]
) -> ir.TensorProtocol:
    """The same plan over other leaves: each leaf is replaced by ``function(leaf)``; the result keeps its dtype.

    Here a leaf is also what is to be replaced as a whole (:attr:`DerivedTensor.whole`).
    """
    return cast(_substitute(tensor, function), tensor.dtype)


def _substitute(
    tensor: ir.TensorProtocol, function: Callable[[ir.TensorProtocol], ir.TensorProtocol]
) -> ir.TensorProtocol:
    if not isinstance(tensor, DerivedTensor) or tensor.whole:
        return function(tensor)
    sources = [_substitute(source, function) for source in tensor.sources]
    match tensor.transform:
        case Transpose(perm):
            return transpose(sources[0], perm)
        case Concat(axis):
            return concat(sources, axis)
        case Stack(axis):
            return stack(sources, axis)
        case Cast(to):
            return cast(sources[0], to)
        case Reshape(shape):
            return reshape(sources[0], shape)
        case Slice(axis, start, end):
            return slice_(sources[0], axis, start, end)
        case Interleave(axis, block) if axis == len(dims(sources[0])) - 2:
            return interleave_rows(sources[0], block)
        case _:
            return DerivedTensor(tensor.transform, sources)


def plan_key(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for two tensors whose plans are the same over the same leaves, hence whose bytes are the same."""
    if isinstance(tensor, DerivedTensor):
        return (tensor.transform, tuple(plan_key(source) for source in tensor.sources))
    return leaf_key(tensor)


def chunks(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """The tensor's little-endian bytes in order, in bounded pieces.

    A leaf, a cast, and a concat or stack on axis 0 need one block of memory; what permutes elements maps its
    sources' files while it runs and copies block by block. Only a transform of a computed source (for example a
    transpose of a stack that moves axis 0) holds that source. Each piece is a copy the caller may keep.
    """
    if isinstance(tensor, DerivedTensor):
        blocks = _blocks(tensor)
    elif isinstance(tensor, ir.ExternalTensor):
        blocks = read_bytes(tensor, BLOCK_BYTES)
    else:
        yield tensor.tobytes()
        return
    # A file holds 4-bit codes packed; what is computed here has one in each byte.
    unpacked = isinstance(tensor, DerivedTensor) and tensor.dtype.bitwidth == 4
    for block in blocks:
        if block.size:
            yield (pack_nibbles(block) if unpacked else block.view(np.uint8)).data


def pack_nibbles(codes: Array) -> Array:
    """4-bit codes, an even number of them, two a byte, the first in the low half, as ONNX stores them."""
    nibbles = codes.reshape(-1).view(np.uint8) & 15
    packed: Array = nibbles[0::2] | nibbles[1::2] << 4
    return packed


def _blocks(tensor: ir.TensorProtocol) -> Iterator[Array]:
    """The elements in row-major order as flat contiguous arrays that own their memory."""
    if not isinstance(tensor, DerivedTensor):
        yield from read_blocks(tensor, BLOCK_BYTES)
        return
    match tensor.transform:
        case Cast(to):
            for block in _blocks(tensor.sources[0]):
                try:
                    converted = cast_array(block, to)
                except OverflowError as error:
                    raise UserError(
                        f"tensor {_describe(tensor)} holds {error}: export it as bf16 or fp32 instead"
                    ) from error
                yield converted
        case Concat(axis=0) | Stack(axis=0):
            for source in tensor.sources:
                yield from _blocks(source)
        case Reshape():
            yield from _blocks(tensor.sources[0])
        case RowWise():
            yield from _row_blocks(tensor)
        case Concat() | Stack():
            parts = [_view(source) for source in tensor.sources]
            rows = max(1, BLOCK_BYTES * dims(tensor)[0] // max(1, tensor.nbytes))
            for start in range(0, dims(tensor)[0], rows):
                yield tensor.transform.apply([part[start : start + rows] for part in parts]).reshape(-1)
        case _:
            yield from _split(_view(tensor))


def _row_blocks(tensor: DerivedTensor) -> Iterator[Array]:
    """Blocks of a row-wise computation, whole rows of axis 0 at a time."""
    read = _row_reader(tensor)
    total = dims(tensor)[0]
    rows = max(1, BLOCK_BYTES * total // max(1, tensor.size * 4))
    for start in range(0, total, rows):
        try:
            yield np.ascontiguousarray(read(start, min(start + rows, total))).reshape(-1)
        except ValueError as error:
            raise UserError(f"tensor {_describe(tensor)} holds {error}: download the checkpoint again") from error


def _row_reader(tensor: ir.TensorProtocol) -> Callable[[int, int], Array]:
    """A function that computes rows ``start`` to ``end`` of ``tensor``; row-wise steps compute no others."""
    if isinstance(tensor, DerivedTensor) and isinstance(tensor.transform, RowWise):
        transform, total = tensor.transform, dims(tensor)[0]
        readers = [(_row_reader(source), dims(source)[0] == 1 != total) for source in tensor.sources]
        return lambda start, end: transform.apply([read(0, 1) if one else read(start, end) for read, one in readers])
    if isinstance(tensor, DerivedTensor) and isinstance(tensor.transform, Reshape):
        (source,) = tensor.sources
        if len(dims(source)) == 3 and dims(tensor)[1:] == dims(source)[2:]:
            return _merged_rows(_row_reader(source), dims(source)[1])
    view = _view(tensor)
    return lambda start, end: view[start:end]


def _merged_rows(read: Callable[[int, int], Array], count: int) -> Callable[[int, int], Array]:
    """Rows of [R, count, W] as those of [R * count, W]."""

    def rows(start: int, end: int) -> Array:
        first = start // count
        block = read(first, -(-end // count))
        merged: Array = block.reshape(-1, block.shape[-1])[start - first * count : end - first * count]
        return merged

    return rows


def _view(tensor: ir.TensorProtocol) -> Array:
    """The tensor as an array: strided over mapped leaves where the plan allows, else computed."""
    if not isinstance(tensor, DerivedTensor):
        return mapped_array(tensor)
    if isinstance(tensor.transform, (Transpose, Slice, Reshape, Interleave, RepeatRows)):
        return tensor.transform.apply([_view(tensor.sources[0])])
    return tensor.numpy()


def _split(array: Array) -> Iterator[Array]:
    """Copies of ``array``'s elements in row-major order, each at most a block."""
    if array.nbytes <= BLOCK_BYTES or array.ndim == 0:
        yield np.array(array, order="C", copy=True).reshape(-1)
        return
    rows = BLOCK_BYTES * len(array) // array.nbytes
    if rows == 0:
        for row in array:
            yield from _split(row)
        return
    for start in range(0, len(array), rows):
        yield np.array(array[start : start + rows], order="C", copy=True).reshape(-1)


def _alike(tensors: Sequence[ir.TensorProtocol]) -> Sequence[ir.TensorProtocol]:
    """``tensors`` widened to float32 when their floating-point dtypes differ."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 and dtypes <= {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}:
        return [cast(tensor, ir.DataType.FLOAT) for tensor in tensors]
    return tensors


def _hoist_cast(
    tensors: Sequence[ir.TensorProtocol], build: Callable[[Sequence[ir.TensorProtocol]], ir.TensorProtocol]
) -> ir.TensorProtocol:
    """``build(tensors)`` with a cast common to all of them moved behind it."""
    kinds = {
        (tensor.sources[0].dtype, tensor.dtype)
        if isinstance(tensor, DerivedTensor) and isinstance(tensor.transform, Cast)
        else None
        for tensor in tensors
    }
    if len(kinds) == 1 and None not in kinds:
        sources = [tensor.sources[0] for tensor in tensors if isinstance(tensor, DerivedTensor)]
        return cast(build(sources), tensors[0].dtype)
    return build(tensors)


def _slice_parts(sources: Sequence[ir.TensorProtocol], axis: int, start: int, end: int) -> Iterator[ir.TensorProtocol]:
    """What the range ``start``:``end`` of a concatenation takes from each of its sources."""
    offset = 0
    for source in sources:
        size = dims(source)[axis]
        low, high = max(start - offset, 0), min(end - offset, size)
        if low < high:
            yield slice_(source, axis, low, high)
        offset += size


def _describe(tensor: ir.TensorProtocol) -> str:
    names = [leaf.name for leaf in leaves(tensor) if leaf.name]
    return repr(names[0]) if len(names) == 1 else f"made of {', '.join(repr(name) for name in names[:3])}"
