"""Accuracy figures against PyTorch in float64 and against formulas written another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qwenforge.calibration.accuracy import (
    HISTOGRAM_EDGES,
    DistributionComparison,
    HiddenComparison,
    LayerAccuracy,
    worst_layers,
)

VOCABULARY = 97


def _logits(positions: int, seed: int = 0, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray, list[int]]:
    generator = np.random.default_rng(seed)
    reference = (4 * generator.standard_normal((positions, VOCABULARY))).astype(np.float32)
    quantized = reference + (noise * generator.standard_normal(reference.shape)).astype(np.float32)
    return reference, quantized, generator.integers(0, VOCABULARY, positions).tolist()


def test_figures_agree_with_pytorch_in_float64() -> None:
    reference, quantized, following = _logits(301)
    comparison = DistributionComparison()
    comparison.add(reference[:170], quantized[:170], following[:170])
    comparison.add(reference[170:], quantized[170:], following[170:])
    result = comparison.result()
    left, right = torch.from_numpy(reference).double(), torch.from_numpy(quantized).double()
    kl = torch.nn.functional.kl_div(right.log_softmax(1), left.log_softmax(1), log_target=True, reduction="none").sum(1)
    tokens = torch.tensor(following)
    assert result.positions == 301
    assert result.mean_kl == pytest.approx(kl.mean().item(), rel=1e-12)
    assert result.p99_kl == pytest.approx(kl.quantile(0.99).item(), rel=1e-12)
    assert result.max_kl == pytest.approx(kl.max().item(), rel=1e-12)
    assert result.top1_agreement == pytest.approx((left.argmax(1) == right.argmax(1)).double().mean().item())
    for logits, perplexity in ((left, result.reference_perplexity), (right, result.perplexity)):
        assert perplexity == pytest.approx(torch.nn.functional.cross_entropy(logits, tokens).exp().item(), rel=1e-12)
    assert result.perplexity_ratio == pytest.approx(result.perplexity / result.reference_perplexity)


def test_last_position_of_a_window_counts_for_divergence_but_not_for_perplexity() -> None:
    reference, quantized, following = _logits(20)
    comparison = DistributionComparison()
    comparison.add(reference, quantized, following[:19])
    result = comparison.result()
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(reference[:19]).double(), torch.tensor(following[:19])
    )
    assert comparison.scored == 19 and result.positions == 20
    assert result.reference_perplexity == pytest.approx(expected.exp().item(), rel=1e-12)


def test_large_logits_do_not_overflow() -> None:
    comparison = DistributionComparison()
    comparison.add(np.array([[1e4, 0.0]], np.float32), np.array([[1e4, 9990.0]], np.float32), [0])
    # KL of (1, 0) against (p, 1 - p) is -log p, with p = 1 / (1 + e^-10).
    assert comparison.result().mean_kl == pytest.approx(math.log1p(math.exp(-10)), rel=1e-9)


def test_equal_models_have_no_divergence() -> None:
    reference, _, following = _logits(33)
    comparison = DistributionComparison()
    comparison.add(reference, reference.copy(), following)
    result = comparison.result()
    assert result.mean_kl == result.max_kl == 0.0
    assert result.perplexity_ratio == 1.0 and result.top1_agreement == 1.0
    assert result.kl_histogram[0] == 33 and sum(result.kl_histogram) == 33


def test_histogram_counts_each_position_in_its_bin() -> None:
    reference, quantized, following = _logits(500)
    comparison = DistributionComparison()
    comparison.add(reference, quantized, following)
    histogram = comparison.result().kl_histogram
    values = np.concatenate(comparison.divergences)
    assert len(histogram) == len(HISTOGRAM_EDGES) - 1 and sum(histogram) == 500
    for low, high, count in zip(HISTOGRAM_EDGES[:-1], HISTOGRAM_EDGES[1:], histogram, strict=True):
        assert count == ((values >= low) & (values < high)).sum()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_recorded_and_left_out(value: float) -> None:
    reference, quantized, following = _logits(70)
    quantized[66, 3] = value
    comparison = DistributionComparison()
    comparison.add(reference, quantized, following, "in window 4")
    assert comparison.non_finite == "of the quantized model in window 4"
    assert comparison.result().positions == 69
    assert math.isfinite(comparison.result().perplexity)


def test_unquantized_logits_that_are_not_finite_are_named_as_such() -> None:
    reference, quantized, following = _logits(5)
    reference[0, 0] = math.nan
    comparison = DistributionComparison()
    comparison.add(reference, quantized, following)
    assert comparison.non_finite == "of the unquantized model"


def test_nothing_compared_is_an_error() -> None:
    with pytest.raises(ValueError, match="no position"):
        DistributionComparison().result()


def test_hidden_states_agree_with_pytorch_token_by_token() -> None:
    generator = np.random.default_rng(5)
    reference = generator.standard_normal((2, 7, 48)).astype(np.float32)
    reference[0, 0] *= 1000  # a massive first token must not hide the others' error
    quantized = reference + 0.01 * generator.standard_normal(reference.shape).astype(np.float32)
    comparison = HiddenComparison()
    comparison.add(reference[:1], quantized[:1])
    comparison.add(reference[1:], quantized[1:])
    left = torch.from_numpy(reference).double().reshape(-1, 48)
    right = torch.from_numpy(quantized).double().reshape(-1, 48)
    ratio = ((left - right).norm(dim=1) / left.norm(dim=1)).square().mean()
    assert comparison.sqnr_db == pytest.approx(-10 * ratio.log10().item(), rel=1e-9)
    cosine = torch.nn.functional.cosine_similarity(left, right).mean().item()
    assert comparison.cosine == pytest.approx(cosine, rel=1e-12)
    assert 39 < comparison.sqnr_db < 42  # noise of a hundredth is 40 dB below


def test_hidden_states_without_error_are_infinitely_good_and_json_has_no_infinity() -> None:
    comparison = HiddenComparison()
    comparison.add(np.ones((3, 4), np.float32), np.ones((3, 4), np.float32))
    assert comparison.sqnr_db == math.inf and comparison.cosine == pytest.approx(1.0)
    layer = LayerAccuracy("model.layers.0", comparison.sqnr_db, 1.0, 30.0, 0.99)
    assert layer.to_json()["own_sqnr_db"] is None and layer.to_json()["sqnr_db"] == 30.0


def test_worst_layers_come_first_and_broken_ones_before_all() -> None:
    layers = [
        LayerAccuracy("a", 30, 1, 30, 1),
        LayerAccuracy("b", 12, 1, 30, 1),
        LayerAccuracy("c", 40, 1, 5, 1),
        LayerAccuracy("d", 50, 1, 30, 1, finite=False),
        LayerAccuracy("e", math.inf, 1, 30, 1),
    ]
    assert [layer.name for layer in worst_layers(layers)] == ["d", "b", "a"]
