"""The range that a static activation scale covers, chosen from a histogram of magnitudes.

``minmax``: the largest magnitude.
``percentile``: the magnitude that a share of all values does not exceed; what is beyond saturates.
``mse``: the range with the least mean squared error of quantized values, over a grid of shares of the largest one.
``entropy``: the range whose quantized values are distributed most like the values themselves, by KL divergence, after
S. Migacz, "8-bit inference with TensorRT" (GTC 2017), as ONNX Runtime's ``quantization/calibrate.py`` does it too; here
also for formats whose steps are not equal.

The range of a tensor whose values are all 0 is 0, and its scale 1.
"""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qwenforge.calibration.observers import MagnitudeHistogram
from qwenforge.calibration.recipes import RangeMethod

Array = npt.NDArray[Any]
Format = Literal["int8", "int4", "fp8"]

LARGEST: dict[Format, float] = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
"""The code that a range's end is mapped to; int4 has -8 too, which only values beyond the range reach."""
_LOWEST = {"int8": -127.0, "int4": -8.0, "fp8": -448.0}

_MSE_GRID = 160
_MSE_SMALLEST = 1 / 4096
_ENTROPY_BINS = 2048
_ENTROPY_CANDIDATES = 120
_ENTROPY_LEAST = 1e-4


def scale_of(largest: float, number_format: Format) -> float:
    """The scale by which codes of ``number_format`` reach ``largest``; 1 where there is nothing to reach."""
    scale = np.float32(largest) / np.float32(LARGEST[number_format])
    return float(scale) if scale > 0 else 1.0


def round_to_codes(scaled: Array, number_format: Format) -> Array:
    """Values that were divided by their scale, rounded to the codes' values, ties to even, and saturated; float32."""
    limited = np.clip(scaled, _LOWEST[number_format], LARGEST[number_format])
    if number_format == "fp8":
        rounded: Array = limited.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return rounded
    whole: Array = np.rint(limited)
    return whole


def choose_range(
    histogram: MagnitudeHistogram, method: RangeMethod, number_format: Format, percentile: float = 99.99
) -> float:
    """The largest magnitude to cover, at most the largest that was seen."""
    if histogram.largest == 0 or method == "minmax":
        return histogram.largest
    if method == "percentile":
        return histogram.percentile(percentile)
    if method == "mse":
        return _least_error(histogram, number_format)
    return _least_divergence(histogram, number_format)


def _least_error(histogram: MagnitudeHistogram, number_format: Format) -> float:
    values, counts = histogram.values()
    shares = np.geomspace(1.0, _MSE_SMALLEST, _MSE_GRID)
    best, best_error = histogram.largest, np.inf
    for candidate in histogram.largest * shares:  # from the largest down: a tie goes to the larger range
        scale = scale_of(float(candidate), number_format)
        error = float(np.dot(counts, (round_to_codes(values / scale, number_format) * scale - values) ** 2))
        if error < best_error:
            best, best_error = float(candidate), error
    return best


def _least_divergence(histogram: MagnitudeHistogram, number_format: Format) -> float:
    edges = np.linspace(0.0, histogram.largest, _ENTROPY_BINS + 1)
    counts = histogram.between(edges)
    centres = (edges[1:] + edges[:-1]) / 2
    smallest = int(LARGEST["int8"]) + 1  # fewer bins than codes would be matched exactly
    best, best_divergence = histogram.largest, np.inf
    for end in np.unique(np.linspace(_ENTROPY_BINS, smallest, _ENTROPY_CANDIDATES).astype(int))[::-1]:
        scale = edges[end] / LARGEST[number_format]
        codes = round_to_codes(centres[:end] / scale, number_format)
        divergence = _divergence(counts, int(end), codes)
        if divergence < best_divergence:
            best, best_divergence = float(edges[end]), divergence
    return best


def _divergence(counts: Array, end: int, codes: Array) -> float:
    """KL of the counts, saturated at bin ``end``, from what is left of them when bins of one code become alike."""
    inside = counts[:end]
    saturated = inside.copy()
    saturated[-1] += counts[end:].sum()
    filled = inside > 0
    _, group = np.unique(codes, return_inverse=True)
    mass = np.bincount(group, weights=inside)
    members = np.bincount(group, weights=filled)
    quantized = np.where(filled, (mass / np.maximum(members, 1))[group], 0.0)
    p, q = _without_zeros(saturated), _without_zeros(quantized)
    if p is None or q is None:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    return float(np.dot(p, np.log(p / q)))


def _without_zeros(counts: Array) -> Array | None:
    """A little mass moved from the bins that have some to those that have none, as ONNX Runtime does it."""
    zeros = counts == 0
    alive = len(counts) - zeros.sum()
    taken = _ENTROPY_LEAST * zeros.sum() / max(1, alive)
    moved = np.where(zeros, _ENTROPY_LEAST, counts - taken)
    return moved if (moved > 0).all() else None
