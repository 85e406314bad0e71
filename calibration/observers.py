"""What calibration remembers of activations: statistics that take chunks as they come and keep no values.

Counts and maxima do not depend on how values are cut into chunks, to the bit; sums do in the last place, which is why
:mod:`qwenforge.calibration.calibrate` fixes the chunks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_SHIFT = 13
_BINS = 1 << (31 - _SHIFT)


class MagnitudeHistogram:
    """How often each magnitude occurs, to ten binary digits of the mantissa.

    A bin holds the float32 numbers that agree in exponent and leading mantissa bits, so that no range has to be known
    beforehand and no bin is ever split or merged.

    Attributes:
        largest: the largest magnitude, exactly.
        count: of values.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.count = 0
        self._counts = np.zeros(_BINS, np.int64)

    def add(self, values: Array) -> None:
        """Count the finite values of an array of any shape, as float32."""
        magnitudes = np.abs(np.ascontiguousarray(values, np.float32)).reshape(-1)
        if magnitudes.size:
            self.largest = max(self.largest, float(magnitudes.max()))
            self.count += magnitudes.size
            self._counts += np.bincount(magnitudes.view(np.uint32) >> _SHIFT, minlength=_BINS)

    def values(self) -> tuple[Array, Array]:
        """The middles of the bins that hold something, ascending, at most ``largest``, and their counts; float64."""
        filled = np.flatnonzero(self._counts)
        low, high = _edges(filled)
        middles = np.where(filled == 0, 0.0, (low + np.minimum(high, self.largest)) / 2)
        return middles, self._counts[filled].astype(np.float64)

    def percentile(self, percent: float) -> float:
        """The least bin's upper end (at most ``largest``) that ``percent`` of the values do not exceed."""
        needed = math.ceil(round(self.count * percent / 100, 6))  # 0.999 * 20000 is a little more than 19980
        place = int(np.searchsorted(np.cumsum(self._counts), needed))
        return min(float(_edges(np.array([place]))[1][0]), self.largest)

    def between(self, edges: Array) -> Array:
        """Counts between consecutive ``edges``, a bin's values taken to be spread evenly over it; float64."""
        filled = np.flatnonzero(self._counts)
        low, high = _edges(filled)
        high = np.minimum(high, np.nextafter(self.largest, np.inf))
        places = np.stack([low, high], 1).reshape(-1)
        below = np.concatenate([[0.0], np.cumsum(self._counts[filled])])
        levels = np.stack([below[:-1], below[1:]], 1).reshape(-1)
        counts: Array = np.diff(np.interp(edges, places, levels, left=0.0))
        counts[-1] += below[-1] - np.interp(edges[-1], places, levels)
        return counts


def _edges(bins: Array) -> tuple[Array, Array]:
    """The least magnitude of each bin and of the bin after it."""
    low = (bins.astype(np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
    high = ((bins.astype(np.uint32) + 1) << _SHIFT).view(np.float32).astype(np.float64)
    return low, high


class ChannelStatistics:
    """Of each of ``channels`` channels, the last axis of what is added.

    Attributes:
        largest: [K] float32, the largest magnitude.
        count: of tokens.
    """

    def __init__(self, channels: int) -> None:
        self.largest = np.zeros(channels, np.float32)
        self.count = 0
        self._magnitudes = np.zeros(channels, np.float64)
        self._squares = np.zeros(channels, np.float64)

    def add(self, values: Array) -> None:
        """Take an array [..., K]."""
        rows = values.reshape(-1, values.shape[-1])
        if not len(rows):
            return
        magnitudes = np.abs(rows)
        np.maximum(self.largest, magnitudes.max(0), out=self.largest)
        self._magnitudes += magnitudes.sum(0, dtype=np.float64)
        self._squares += np.square(rows, dtype=np.float64).sum(0)
        self.count += len(rows)

    @property
    def mean_magnitude(self) -> Array:
        """[K] float64."""
        return self._magnitudes / max(1, self.count)

    @property
    def mean_square(self) -> Array:
        """[K] float64."""
        return self._squares / max(1, self.count)
