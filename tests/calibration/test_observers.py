"""Streaming statistics against the same statistics of all values at once."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from qwenforge.calibration.observers import ChannelStatistics, MagnitudeHistogram

BIN = 2.0**-10
"""Relative width of a histogram's bin."""


def _values(seed: int = 0, size: int = 20_000) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(size) * np.exp(generator.standard_normal(size))).astype(np.float32)


@pytest.mark.parametrize("percent", [50.1, 90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_that_of_all_values(percent: float) -> None:
    values = _values()
    histogram = MagnitudeHistogram()
    histogram.add(values)
    rank = math.ceil(len(values) * Fraction(str(percent)) / 100)
    exact = np.sort(np.abs(values))[rank - 1]
    assert exact <= histogram.percentile(percent) <= exact * (1 + BIN)


def test_histogram_does_not_depend_on_chunks() -> None:
    values = _values()
    whole, parts = MagnitudeHistogram(), MagnitudeHistogram()
    whole.add(values.reshape(200, 100))
    for part in np.split(values, [7, 1000, 1001, 15_000]):
        parts.add(part)
    for left, right in zip(whole.values(), parts.values(), strict=True):
        np.testing.assert_array_equal(left, right)
    assert (whole.largest, whole.count) == (parts.largest, parts.count)


def test_histogram_keeps_every_value_and_its_place() -> None:
    values = np.array([0, 0, -0.0, 1e-42, 1.5, -1.5, 3e38], np.float32)
    histogram = MagnitudeHistogram()
    histogram.add(values)
    middles, counts = histogram.values()
    assert counts.sum() == 7 and counts[0] == 4  # the subnormal number falls into the bin of 0
    np.testing.assert_allclose(middles[1:], [1.5, 3e38], rtol=BIN)
    assert histogram.largest == np.float32(3e38)


def test_counts_between_edges_add_up_and_match_numpy() -> None:
    values = _values()
    histogram = MagnitudeHistogram()
    histogram.add(values)
    edges = np.linspace(0, histogram.largest, 65)
    counts = histogram.between(edges)
    expected, _ = np.histogram(np.abs(values), edges)
    assert counts.sum() == pytest.approx(len(values), abs=1e-6)
    # A bin of the histogram may straddle an edge: its share on either side is a guess.
    np.testing.assert_allclose(counts, expected, atol=0.01 * len(values))
    assert np.abs(counts - expected).mean() < 10


def test_channel_statistics_match_float64() -> None:
    values = _values().reshape(200, 100)
    statistics = ChannelStatistics(100)
    for part in np.split(values, [1, 50, 120]):
        statistics.add(part)
    exact = values.astype(np.float64)
    np.testing.assert_array_equal(statistics.largest, np.abs(values).max(0))
    np.testing.assert_allclose(statistics.mean_magnitude, np.abs(exact).mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.mean_square, np.square(exact).mean(0), rtol=1e-12)
    assert statistics.count == 200
