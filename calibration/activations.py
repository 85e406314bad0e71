"""A value that sites read, of every calibration token, on disk: statistics, samples and ranges of it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.calibration.observers import ChannelStatistics, MagnitudeHistogram
from qwenforge.calibration.spill import SpilledValue

Array = npt.NDArray[Any]

SAMPLE_TOKENS = 512
"""Tokens that searches measure errors on."""


class Activation:
    """Rows of a spilled value as tokens [T, K], always taken in the same order and chunks.

    Args:
        spilled: the value, complete.
        rows: how many calibration rows it holds.
    """

    def __init__(self, spilled: SpilledValue, rows: int) -> None:
        assert spilled.shape is not None
        self._spilled = spilled
        self._rows = rows
        self.channels = spilled.shape[-1]
        self._row_tokens = int(np.prod(spilled.shape[:-1]))
        self.count = rows * self._row_tokens

    @functools.cached_property
    def statistics(self) -> ChannelStatistics:
        """Of each channel over all tokens."""
        found = ChannelStatistics(self.channels)
        for tokens in self._spilled.tokens(self._rows):
            found.add(tokens)
        return found

    def histogram(self, divisors: Array) -> MagnitudeHistogram:
        """Of all values, channels divided by ``divisors`` [K]."""
        found = MagnitudeHistogram()
        for tokens in self._spilled.tokens(self._rows):
            found.add(tokens / divisors)
        return found

    def second_moments(self, divisors: Array, channels: slice) -> Array:
        """[k, k] float32 of some channels: the mean of x x^T with channels divided by ``divisors`` [K]."""
        divisors = divisors[channels]
        found = np.zeros((len(divisors), len(divisors)), np.float32)
        for tokens in self._spilled.tokens(self._rows):
            divided = tokens[:, channels] / divisors
            found += divided.T @ divided
        found /= np.float32(self.count)
        return found

    def sample(self, limit: int = SAMPLE_TOKENS) -> Array:
        """[at most ``limit``, K]: tokens at equal distances."""
        return self.gather(self.sampled(limit))

    def sampled(self, limit: int = SAMPLE_TOKENS) -> Array:
        """The numbers of the tokens that :meth:`sample` gives."""
        return np.unique(np.linspace(0, self.count - 1, min(limit, self.count)).astype(np.int64))

    def gather(self, tokens: Array) -> Array:
        """[N, K]: the tokens of those ascending numbers."""
        found = np.empty((len(tokens), self.channels), np.float32)
        rows = tokens // self._row_tokens
        for row in np.unique(rows):
            inside = rows == row
            values = self._spilled.row(int(row)).reshape(-1, self.channels)
            found[inside] = values[tokens[inside] % self._row_tokens]
        return found

    def all(self) -> Array:
        """[T, K], in memory: for narrow values only."""
        return np.concatenate(list(self._spilled.tokens(self._rows)))
