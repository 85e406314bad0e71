"""The key/value cache: buffers allocated once, bound in place as the graph's past inputs and present outputs.

Each tensor is one [B, Hk, M, D] buffer, in host memory or on a device (:mod:`qwenforge.runtime.memory`). A range of
rows is itself contiguous, so a step can be bound to some rows of a larger cache without a copy. Memory is zero-filled;
on the host the operating system commits it on first write: unused capacity costs address space there, not RAM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwenforge.runtime.memory import CacheBuffer, HostMemory, Memory

CAPACITY_GRANULE = 64
"""Capacities are rounded up to this many tokens, so that similar requests reuse one memory plan."""


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor: the graph input and output that share its buffer, and one row's shape [Hk, D]."""

    past_name: str
    present_name: str
    num_key_value_heads: int
    head_size: int


@dataclass(frozen=True)
class BoundRows:
    """Some rows of a cache tensor as a session binds them."""

    buffer: CacheBuffer
    address: int
    shape: tuple[int, int, int, int]


def rounded_capacity(needed: int, limit: int) -> int:
    """The capacity to allocate for ``needed`` tokens: rounded up to ``CAPACITY_GRANULE``, at most ``limit``."""
    return min(limit, -(-needed // CAPACITY_GRANULE) * CAPACITY_GRANULE)


class KeyValueCache:
    """Cache buffers of ``batch`` rows of ``capacity`` tokens for every layer; in host memory unless told otherwise."""

    def __init__(
        self,
        tensors: tuple[CacheTensor, ...],
        *,
        batch: int,
        capacity: int,
        dtype: np.dtype[np.generic],
        memory: Memory | None = None,
    ) -> None:
        self.tensors = tensors
        self.batch = batch
        self.capacity = capacity
        self.dtype = dtype
        place = memory or HostMemory()
        shapes = [(batch, tensor.num_key_value_heads, capacity, tensor.head_size) for tensor in tensors]
        buffers = place.cache_buffers(shapes, dtype)
        self._buffers = {tensor.past_name: buffer for tensor, buffer in zip(tensors, buffers, strict=True)}

    @property
    def buffers(self) -> Mapping[str, NDArray[np.floating]]:
        """Arrays [B, Hk, M, D] by the name of the past input: the buffers on the host, copies of them from a device."""
        return {name: buffer.read() for name, buffer in self._buffers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers; on the host, of address space."""
        return sum(self.batch * buffer.row_bytes for buffer in self._buffers.values())

    def rows(self, tensor: CacheTensor, first: int, count: int) -> BoundRows:
        """Rows ``first`` to ``first + count`` of one tensor, [count, Hk, M, D] and contiguous."""
        if not 0 <= first <= first + count <= self.batch:
            raise IndexError(f"rows {first} to {first + count} of a cache of {self.batch} rows")
        buffer = self._buffers[tensor.past_name]
        shape = (count, tensor.num_key_value_heads, self.capacity, tensor.head_size)
        return BoundRows(buffer, buffer.address + first * buffer.row_bytes, shape)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source`` over row ``target``."""
        for buffer in self._buffers.values():
            buffer.copy_row(source, target, length)
