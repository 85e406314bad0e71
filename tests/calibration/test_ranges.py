"""Ranges against brute force over the values themselves, and rounding against PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwenforge.calibration.observers import MagnitudeHistogram
from qwenforge.calibration.ranges import LARGEST, Format, choose_range, round_to_codes, scale_of


def _histogram(values: np.ndarray) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    histogram.add(values)
    return histogram


def _normal(outlier: float = 0.0) -> np.ndarray:
    values = np.random.default_rng(3).standard_normal(50_000).astype(np.float32)
    if outlier:
        values[0] = outlier
    return values


def _without_zeros(counts: list[float]) -> list[float]:
    zeros = sum(each == 0 for each in counts)
    taken = 1e-4 * zeros / (len(counts) - zeros)
    return [1e-4 if each == 0 else each - taken for each in counts]


def _torch_rounded(values: np.ndarray, scale: float, number_format: Format) -> np.ndarray:
    tensor = torch.from_numpy(values)
    if number_format == "fp8":
        limited = (tensor / scale).clamp(-448, 448)
        return (limited.to(torch.float8_e4m3fn).float() * scale).numpy()
    low, high = {"int8": (-127, 127), "int4": (-8, 7)}[number_format]
    return torch.fake_quantize_per_tensor_affine(tensor, scale, 0, low, high).numpy()


@pytest.mark.parametrize("number_format", ["int8", "int4", "fp8"])
def test_rounding_is_pytorch_s(number_format: Format) -> None:
    values = _normal() * 2
    scale = scale_of(3.0, number_format)  # some values saturate
    ours = round_to_codes(values / np.float32(scale), number_format) * np.float32(scale)
    expected = _torch_rounded(values, scale, number_format)
    # PyTorch multiplies by 1 / scale: a value halfway between two codes may go either way.
    assert np.mean(np.abs(ours - expected) > 1e-6) < 1e-3
    assert np.abs(ours - expected).max() <= scale * (64 if number_format == "fp8" else 1) * 1.001


@pytest.mark.parametrize("number_format", ["int8", "fp8"])
def test_mse_range_has_the_least_error_of_the_values(number_format: Format) -> None:
    values = _normal(outlier=300.0)
    found = choose_range(_histogram(values), "mse", number_format)

    def error(largest: float) -> float:
        scale = np.float32(largest / LARGEST[number_format])
        rounded = round_to_codes(values / scale, number_format) * scale
        return float(np.square(rounded.astype(np.float64) - values).mean())

    grid = np.geomspace(300 / 4096, 300, 400)
    assert error(found) <= 1.02 * min(error(each) for each in grid)


def test_entropy_range_is_that_of_a_direct_computation() -> None:
    """The published loop for int8, bin by bin, without vectorization."""
    values = _normal(outlier=12.0)
    histogram = _histogram(values)
    bins = 2048
    counts = histogram.between(np.linspace(0, histogram.largest, bins + 1))
    width = histogram.largest / bins
    best: tuple[float, float] = (np.inf, 0.0)
    for end in sorted({int(each) for each in np.linspace(bins, 128, 120)}, reverse=True):
        p = [float(each) for each in counts[:end]]
        p[-1] += float(counts[end:].sum())
        groups: dict[int, list[int]] = {}
        for index in range(end):
            code = int(np.clip(np.rint((index + 0.5) * width / (end * width / 127)), 0, 127))
            groups.setdefault(code, []).append(index)
        q = [0.0] * end
        for members in groups.values():
            alive = [index for index in members if counts[index] > 0]
            for index in alive:
                q[index] = sum(counts[each] for each in alive) / len(alive)
        p, q = _without_zeros(p), _without_zeros(q)
        total_p, total_q = sum(p), sum(q)
        divergence = sum(a / total_p * np.log(a / total_p / (b / total_q)) for a, b in zip(p, q, strict=True))
        if divergence < best[0]:
            best = (divergence, end * width)
    assert choose_range(histogram, "entropy", "int8") == pytest.approx(best[1], rel=1e-9)


def test_percentile_leaves_out_a_single_outlier_x1000() -> None:
    histogram = _histogram(_normal(outlier=4000.0))
    assert choose_range(histogram, "minmax", "int8") == 4000.0
    assert choose_range(histogram, "percentile", "int8", 99.99) < 5


def test_entropy_leaves_out_a_single_outlier() -> None:
    assert choose_range(_histogram(_normal(outlier=40.0)), "entropy", "int8") < 10


def test_zeros_have_a_range_of_zero_and_a_scale_of_one() -> None:
    histogram = _histogram(np.zeros(10, np.float32))
    for method in ("minmax", "percentile", "mse", "entropy"):
        assert choose_range(histogram, method, "int8") == 0
    assert scale_of(0.0, "int8") == 1.0
