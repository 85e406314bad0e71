"""Reading the leaves of a weight plan: bytes of files in bounded blocks, without keeping their pages in memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Hashable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qwenforge.errors import GraphError, UserError
from qwenforge.exporter.transforms import Array


def leaf_key(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for two leaves with the same bytes in the same file; any other tensor equals only itself."""
    if isinstance(tensor, ir.ExternalTensor):
        where = os.path.realpath(tensor.path)
        return ("file", where, tensor.offset or 0, tensor.nbytes, tensor.dtype, tuple(tensor.shape))
    return ("object", id(tensor))


def data_path(tensor: ir.ExternalTensor) -> Path:
    """The file behind ``tensor``; raises GraphError when its location leaves the model's folder.

    An absolute location without a base folder is trusted: only code of this project makes such tensors (onnx_ir
    applies the same rule). Hard links inside the folder are accepted, because ``export --weights link`` makes them.
    """
    path = Path(tensor.path)
    if tensor.base_dir:
        base = os.path.realpath(os.fspath(tensor.base_dir))
        if not Path(os.path.realpath(path)).is_relative_to(base):
            raise GraphError(
                f"tensor {tensor.name!r} keeps its data in {os.fspath(tensor.location)!r}, outside the model's folder "
                f"{base}: move the data file beside the model"
            )
    if not path.is_file():
        raise GraphError(f"the data file {path} of tensor {tensor.name!r} is missing: restore it beside the model")
    return path


def read_blocks(tensor: ir.TensorProtocol, block_bytes: int) -> Iterator[Array]:
    """The elements in row-major order as flat arrays of at most ``block_bytes``; files are read, never mapped."""
    if isinstance(tensor, ir.ExternalTensor):
        dtype = _element_type(tensor)
        for block in read_bytes(tensor, max(1, block_bytes // dtype.itemsize) * dtype.itemsize):
            yield block.view(dtype)
        return
    array = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    step = max(1, block_bytes // max(1, array.dtype.itemsize))
    for start in range(0, array.size, step):
        yield array[start : start + step].copy()


def read_bytes(tensor: ir.ExternalTensor, block_bytes: int) -> Iterator[Array]:
    """The bytes of a tensor's file range as uint8 arrays of ``block_bytes``, the last one shorter."""
    with open(data_path(tensor), "rb") as file:
        file.seek(tensor.offset or 0)
        for start in range(0, tensor.nbytes, block_bytes):
            block = np.empty(min(block_bytes, tensor.nbytes - start), dtype=np.uint8)
            if file.readinto(block.data) != block.nbytes:
                raise _too_short(tensor)
            yield block


def mapped_array(tensor: ir.TensorProtocol) -> Array:
    """The tensor as an array; a file's bytes are mapped, and unmapped when the last view of them is dropped.

    Each call makes its own mapping (unlike ``ExternalTensor.numpy``, which keeps one), so pages never pile up.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    dtype, shape = _element_type(tensor), tensor.shape.numpy()
    if tensor.size == 0:
        return np.empty(shape, dtype=dtype)
    offset = tensor.offset or 0
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    path = data_path(tensor)
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < offset + tensor.nbytes:
            raise _too_short(tensor)
        mapping = mmap.mmap(file.fileno(), offset - start + tensor.nbytes, offset=start, access=mmap.ACCESS_READ)
    return np.frombuffer(mapping, dtype=dtype, count=tensor.size, offset=offset - start).reshape(shape)


def _element_type(tensor: ir.ExternalTensor) -> np.dtype[np.generic]:
    if tensor.dtype.bitwidth < 8:
        raise GraphError(f"tensor {tensor.name!r} is {tensor.dtype.name}: packed types cannot be streamed element-wise")
    return np.dtype(tensor.dtype.numpy())


def _too_short(tensor: ir.ExternalTensor) -> UserError:
    return UserError(
        f"{tensor.path} ends before tensor {tensor.name!r} does (bytes {tensor.offset or 0} to "
        f"{(tensor.offset or 0) + tensor.nbytes}): the file is truncated, copy or download it again"
    )
