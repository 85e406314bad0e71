"""The key/value cache: buffers allocated once, bound in place as the graph's past inputs and present outputs.

Each tensor is one [B, Hk, M, D] array. A range of rows is itself contiguous, so a step can be bound to some rows
of a larger cache without a copy. Memory is zero-filled and committed by the operating system on first write:
unused capacity costs address space, not RAM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CAPACITY_GRANULE = 64
"""Capacities are rounded up to this many tokens, so that similar requests reuse one memory plan."""


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor: the graph input and output that share its buffer, and one row's shape [Hk, D]."""

    past_name: str
    present_name: str
    num_key_value_heads: int
    head_size: int


def rounded_capacity(needed: int, limit: int) -> int:
    """The capacity to allocate for ``needed`` tokens: rounded up to ``CAPACITY_GRANULE``, at most ``limit``."""
    return min(limit, -(-needed // CAPACITY_GRANULE) * CAPACITY_GRANULE)


class KeyValueCache:
    """Cache buffers of ``batch`` rows of ``capacity`` tokens for every layer."""

    def __init__(
        self, tensors: tuple[CacheTensor, ...], *, batch: int, capacity: int, dtype: np.dtype[np.floating]
    ) -> None:
        self.tensors = tensors
        self.batch = batch
        self.capacity = capacity
        self.dtype = dtype
        self._buffers: dict[str, NDArray[np.floating]] = {
            t.past_name: np.zeros((batch, t.num_key_value_heads, capacity, t.head_size), dtype) for t in tensors
        }

    @property
    def buffers(self) -> Mapping[str, NDArray[np.floating]]:
        """The arrays [B, Hk, M, D] by the name of the past input they are bound to."""
        return self._buffers

    @property
    def nbytes(self) -> int:
        """Bytes of address space of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def rows(self, tensor: CacheTensor, first: int, count: int) -> NDArray[np.floating]:
        """A contiguous view [count, Hk, M, D] of rows ``first`` to ``first + count`` of one tensor."""
        if not 0 <= first <= first + count <= self.batch:
            raise IndexError(f"rows {first} to {first + count} of a cache of {self.batch} rows")
        return self._buffers[tensor.past_name][first : first + count]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source`` over row ``target``."""
        for buffer in self._buffers.values():
            buffer[target, :, :length] = buffer[source, :, :length]
