"""A value that sites read, of every calibration token, on disk: statistics, samples and ranges of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.calibration.observers import ChannelStatistics, MagnitudeHistogram
from qwenforge.calibration.spill import SpilledValue

Array = npt.NDArray[Any]

SAMPLE_TOKENS = 512
"""Tokens that searches measure errors on."""


@dataclass(frozen=True)
class Half:
    """One half of a value's tokens.

    Attributes:
        largest: [K], each channel's largest magnitude over the whole half.
        sample: [at most 512, K], tokens of the half at equal distances.
    """

    largest: Array
    sample: Array


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

    def halves(self) -> tuple[Half, Half]:
        """The first and the second half of the tokens: to fit on one and to judge on the other."""
        middle, start = self.count // 2, 0  # by tokens, not rows: one long row has halves too
        largest = np.zeros((2, self.channels), np.float32)
        for tokens in self._spilled.tokens(self._rows):
            magnitudes = np.abs(tokens)
            cut = min(max(middle - start, 0), len(tokens))
            for half, part in enumerate((magnitudes[:cut], magnitudes[cut:])):
                largest[half] = np.maximum(largest[half], part.max(0, initial=0))
            start += len(tokens)
        numbers = self.sampled(2 * SAMPLE_TOKENS)
        first, second = (self.gather(part) for part in (numbers[numbers < middle], numbers[numbers >= middle]))
        return Half(largest[0], first), Half(largest[1], second)

    def all(self) -> Array:
        """[T, K], in memory: for narrow values only."""
        return np.concatenate(list(self._spilled.tokens(self._rows)))
