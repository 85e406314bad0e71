"""Scales of weights: from the largest magnitude of each group, or below it where that costs less.

A matrix is [N, K], N output channels; a group is ``group_size`` columns of a row, the last one of a row may be shorter.
A group of zeros has scale 1. Scales of integers are numbers that float16 has (exporter/scale_rounding.py).

Clipping is searched for as in AWQ (Lin et al. 2023, arXiv:2306.00978, "auto_clip" of its code): each group takes the
largest magnitude, among shares of its own from 1 down to 1/2, that changes the outputs least. The change is taken to be
the squared errors of weights, each weighted with the mean square of its input channel, which leaves out how channels
vary together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.calibration.ranges import LARGEST, Format, round_to_codes
from qwenforge.exporter.scale_rounding import half_scales
from qwenforge.exporter.transforms import spread_groups

Array = npt.NDArray[Any]

CLIPPING_SHARES = tuple(1 - step / 40 for step in range(21))
"""1 down to 1/2 in steps of 1/40; 7/8 among them lets int4's code -8 hold a group's largest magnitude."""

_BLOCK_ELEMENTS = 1 << 22


def group_scales(weight: Array, number_format: Format, group_size: int) -> Array:
    """[N, G] float32: the largest magnitude of each group becomes the largest code."""
    return _scales(_largest(weight, group_size), number_format)


def tensor_scales(weight: Array, number_format: Format) -> Array:
    """[N, 1] float32, the same for every row: one scale for the matrix."""
    largest = np.full((len(weight), 1), np.abs(weight).max(initial=0.0), np.float32)
    return _scales(largest, number_format)


def fake_quantized(weight: Array, scales: Array, number_format: Format, group_size: int) -> Array:
    """The values that codes rounded to nearest stand for, [N, K] float32."""
    spread = spread_groups(scales, group_size, weight.shape[1])
    values: Array = round_to_codes(weight / spread, number_format) * spread
    return values


def clipped_scales(weight: Array, mean_squares: Array, number_format: Format, group_size: int) -> Array:
    """[N, G] float32: of the shares above, the one that changes outputs least; of equals, the largest.

    Args:
        weight: [N, K].
        mean_squares: [K], of the input channels.
        number_format: of the codes.
        group_size: columns of a group.
    """
    columns = weight.shape[1]
    starts = np.arange(0, columns, group_size)
    result = np.empty((len(weight), len(starts)), np.float32)
    rows = max(1, _BLOCK_ELEMENTS // columns)
    importance = mean_squares.astype(np.float32)
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        largest = _largest(block, group_size)
        best = _scales(largest, number_format)
        best_error = np.full(largest.shape, np.inf)
        for share in CLIPPING_SHARES:
            scales = _scales(largest * np.float32(share), number_format)
            errors = np.square(fake_quantized(block, scales, number_format, group_size) - block) * importance
            summed = np.add.reduceat(errors, starts, axis=1)
            better = summed < best_error
            best[better], best_error[better] = scales[better], summed[better]
        result[start : start + rows] = best
    return result


def _largest(weight: Array, group_size: int) -> Array:
    starts = np.arange(0, weight.shape[1], group_size)
    largest: Array = np.maximum.reduceat(np.abs(weight), starts, axis=1)
    return largest


def _scales(largest: Array, number_format: Format) -> Array:
    scales = largest / np.float32(LARGEST[number_format])
    positive: Array = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    return positive if number_format == "fp8" else half_scales(positive)
