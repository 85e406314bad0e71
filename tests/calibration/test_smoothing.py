"""Smoothing factors against the papers' formulas in PyTorch, and the search against brute force."""

from __future__ import annotations

import numpy as np
import torch

from qwenforge.calibration.places import Place
from qwenforge.calibration.smoothing import (
    AWQ_STRENGTHS,
    SMOOTHQUANT_STRENGTHS,
    awq_candidates,
    output_errors,
    smoothquant_factors,
)
from qwenforge.calibration.weight_scales import fake_quantized, group_scales


def _case() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    inputs = generator.standard_normal((64, 48)) * np.exp(2 * generator.standard_normal(48))
    return inputs.astype(np.float32), generator.standard_normal((20, 48)).astype(np.float32)


def test_smoothquant_factors_are_equation_4() -> None:
    inputs, weight = _case()
    inputs[:, 7] = 0
    found = smoothquant_factors(np.abs(inputs).max(0), np.abs(weight).max(0), 0.3)
    x, w = torch.from_numpy(inputs).double(), torch.from_numpy(weight).double()
    expected = x.abs().amax(0) ** 0.3 / w.abs().amax(0) ** 0.7
    expected[7] = 1
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def test_awq_search_finds_the_least_error_of_the_grid() -> None:
    inputs, weight = _case()
    magnitudes = np.abs(inputs).mean(0, dtype=np.float64)
    candidates = awq_candidates(magnitudes)

    def quantized(matrix: np.ndarray) -> np.ndarray:
        return fake_quantized(matrix, group_scales(matrix, "int4", 16), "int4", 16)

    found = output_errors(inputs, weight, candidates, quantized)
    x, w = torch.from_numpy(inputs).double(), torch.from_numpy(weight).double()
    expected = []
    for strength in AWQ_STRENGTHS:
        factors = torch.from_numpy(magnitudes) ** strength
        factors = factors.clamp(min=1e-4)
        factors = factors / (factors.max() * factors.min()).sqrt()
        scaled = (w * factors).reshape(20, 3, 16)
        scales = scaled.abs().amax(-1, keepdim=True) / 7
        rounded = (scaled / scales).round().clamp(-8, 7) * scales
        expected.append(((x / factors) @ rounded.reshape(20, 48).T - x @ w.T).square().mean().item())
    np.testing.assert_allclose(found, expected, rtol=2e-2)  # float32 rounds a few codes the other way
    assert int(np.argmin(found)) == int(np.argmin(expected)) != 0
    assert np.all(candidates[0] == 1)


def test_error_of_smoothquant_counts_inputs_and_weights() -> None:
    inputs, weight = _case()
    candidates = [
        smoothquant_factors(np.abs(inputs).max(0), np.abs(weight).max(0), strength)
        for strength in SMOOTHQUANT_STRENGTHS
    ]

    def rounded_inputs(factors: np.ndarray) -> np.ndarray:
        divided = inputs / factors
        scale = np.abs(divided).max() / 127
        return np.rint(divided / scale) * scale * factors

    def rounded_weight(matrix: np.ndarray) -> np.ndarray:
        return fake_quantized(matrix, group_scales(matrix, "int8", 48), "int8", 48)

    found = output_errors(inputs, weight, candidates, rounded_weight, [rounded_inputs(each) for each in candidates])
    x, w = torch.from_numpy(inputs).double(), torch.from_numpy(weight).double()
    expected = []
    for strength in SMOOTHQUANT_STRENGTHS:
        factors = x.abs().amax(0) ** strength / w.abs().amax(0) ** (1 - strength)
        smooth, scaled = x / factors, w * factors
        input_scale, weight_scales = smooth.abs().max() / 127, scaled.abs().amax(1, keepdim=True) / 127
        outputs = (smooth / input_scale).round() @ (scaled / weight_scales).round().T * input_scale * weight_scales.T
        expected.append((outputs - x @ w.T).square().mean().item())
    np.testing.assert_allclose(found, expected, rtol=2e-2)  # float32 rounds a few codes the other way
    assert int(np.argmin(found)) == int(np.argmin(expected)) != 5


def test_factors_of_values_are_shared_by_the_query_heads_of_a_key_head() -> None:
    place = Place("o_proj", "values", ("o_proj",), None, repeats=2, head_size=3)
    channels = np.arange(12, dtype=np.float32)  # 2 key heads, each with 2 query heads of 3 channels
    np.testing.assert_array_equal(place.shared(channels, np.maximum), [3, 4, 5, 9, 10, 11])
    np.testing.assert_array_equal(place.shared(channels, np.add), [1.5, 2.5, 3.5, 7.5, 8.5, 9.5])
    np.testing.assert_array_equal(place.spread(np.array([1, 2, 3, 4, 5, 6])), [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6])
