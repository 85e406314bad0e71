"""The cache whose decode steps are captured as CUDA graphs: kept between calls, as the graphs name its addresses.

ONNX Runtime keeps what it captured until the session ends (1.31 does so even when asked to release it), so that a new
cache for every call would be a leak. One cache is kept instead, and with it the step of each batch size. It grows to
what is asked for: to that many rows, and to a power of two of tokens, which bounds how often. A call that finds it in
use gets a cache of its own, whose steps are not captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from qwenforge.runtime.kv_cache import CAPACITY_GRANULE, KeyValueCache


class Step(Protocol):
    """A bound step, as far as it is kept here."""

    def close(self) -> None:
        """Let go of what was captured."""


StepT = TypeVar("StepT", bound=Step)


class CachePool(Generic[StepT]):
    """Hands the kept cache out to one call at a time.

    Args:
        allocate: makes a cache of so many rows and tokens.
    """

    def __init__(self, allocate: Callable[[int, int], KeyValueCache]) -> None:
        self._allocate = allocate
        self._kept: KeyValueCache | None = None
        self._steps: dict[int, StepT] = {}
        self._in_use = False
        self._lock = threading.Lock()

    def take(self, batch: int, capacity: int) -> KeyValueCache:
        """A cache of at least ``batch`` rows of ``capacity`` tokens, which may hold an earlier call's."""
        with self._lock:
            if self._in_use:
                return self._allocate(batch, capacity)
            kept = self._kept
            if kept is None or kept.batch < batch or kept.capacity < capacity:
                rows, tokens = (kept.batch, kept.capacity) if kept is not None else (0, 0)
                self._drop()
                kept = self._allocate(max(batch, rows), max(_power_of_two(capacity), tokens))
            self._kept, self._in_use = kept, True
            return kept

    def give_back(self, cache: KeyValueCache) -> None:
        """The call that took ``cache`` is done with it."""
        with self._lock:
            if cache is self._kept:
                self._in_use = False

    def keeps(self, cache: KeyValueCache) -> bool:
        """Whether steps of ``cache`` are worth capturing."""
        return cache is self._kept

    def step(self, batch: int, make: Callable[[], StepT]) -> StepT:
        """The decode step of the first ``batch`` rows of the kept cache, made when it is first asked for."""
        if batch not in self._steps:
            self._steps[batch] = make()
        return self._steps[batch]

    def _drop(self) -> None:
        for step in self._steps.values():
            step.close()
        self._steps, self._kept = {}, None


def _power_of_two(capacity: int) -> int:
    size = CAPACITY_GRANULE
    while size < capacity:
        size *= 2
    return size
