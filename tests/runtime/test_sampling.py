from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwenforge.errors import BundleError, UserError
from qwenforge.runtime.sampling import (
    Sampler,
    SamplingOptions,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    process,
    scale_temperature,
)

V = 1000


def _scores(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (3 * np.random.default_rng(seed).standard_normal(V)).astype(np.float32)


def _reference(processor: Any, scores: Any, seen: Any = (0,)) -> Any:
    import torch

    return processor(torch.tensor([list(seen)]), torch.tensor(scores)[None])[0].numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("value", [0.05, 0.3, 0.8, 0.95])
def test_each_processor_equals_transformers(seed: int, value: float) -> None:
    from transformers.generation import logits_process as hf

    scores = _scores(seed)
    seen = np.random.default_rng(seed).integers(0, V, 50).tolist()
    k = int(value * V)
    cases = [
        (penalize_repetition(scores, seen, 1 + value), hf.RepetitionPenaltyLogitsProcessor(1 + value)),
        (scale_temperature(scores, value), hf.TemperatureLogitsWarper(value)),
        (keep_top_k(scores, k), hf.TopKLogitsWarper(k)),
        (keep_top_p(scores, value), hf.TopPLogitsWarper(value)),
        (keep_min_p(scores, value), hf.MinPLogitsWarper(value)),
    ]
    for ours, processor in cases:
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, _reference(processor, scores, seen), err_msg=type(processor).__name__)


@pytest.mark.parametrize("seed", range(5))
def test_all_processors_together_equal_transformers_order(seed: int) -> None:
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    settings: dict[str, Any] = {
        "repetition_penalty": 1.2, "temperature": 0.7, "top_k": 60, "top_p": 0.9, "min_p": 0.02
    }  # fmt: skip
    with torch.device("meta"):
        small = Qwen2Config(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
        model = Qwen2ForCausalLM(small)
    config = GenerationConfig(do_sample=True, **settings)
    processors = model._get_logits_processor(config, 1, torch.tensor([[0]]), None, [], device="cpu")
    seen = np.random.default_rng(seed).integers(0, V, 50).tolist()
    scores = _scores(seed) / 3
    expected = processors(torch.tensor([seen]), torch.tensor(scores)[None])[0].numpy()
    ours = process(scores, SamplingOptions(**settings), seen)
    assert 1 < np.isfinite(ours).sum() < 60
    np.testing.assert_array_equal(ours, expected)


def test_top_k_keeps_ties_and_everything_when_large() -> None:
    scores = np.array([1, 2, 2, 0], np.float32)
    assert np.isfinite(keep_top_k(scores, 1)).tolist() == [False, True, True, False]
    assert keep_top_k(scores, 9) is scores


def test_top_p_keeps_the_best_when_tiny() -> None:
    assert np.flatnonzero(np.isfinite(keep_top_p(_scores(0), 1e-9))).tolist() == [int(_scores(0).argmax())]


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.99])
def test_top_p_equals_transformers_large_vocabulary(spread: float, top_p: float) -> None:
    from transformers.generation.logits_process import TopPLogitsWarper

    scores = (spread * np.random.default_rng(0).standard_normal(50_000)).astype(np.float32)
    expected = _reference(TopPLogitsWarper(top_p), scores)
    ours = keep_top_p(scores, top_p)
    # transformers adds 50,000 probabilities in fp32: a few tokens at the boundary may fall on the other side.
    assert np.count_nonzero(ours != expected) <= 5
    kept = np.isfinite(ours)
    assert scores[kept].min() > scores[~kept].max()


def test_processors_leave_their_input_unchanged() -> None:
    scores = _scores(0)
    process(scores, SamplingOptions(0.5, 10, 0.5, 0.1, 1.3), [1, 2])
    np.testing.assert_array_equal(scores, _scores(0))


def test_sampler_draws_with_the_softmax_probabilities() -> None:
    scores = np.log(np.array([0.5, 0.2, 0.3, 0.0] + [0.0] * 6, np.float32) + 1e-30).astype(np.float32)
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=0))
    draws = 20_000
    counts = np.bincount([sampler.choose(scores, ()) for _ in range(draws)], minlength=10)
    # Four standard deviations of a binomial share.
    np.testing.assert_allclose(counts[:3] / draws, [0.5, 0.2, 0.3], rtol=0, atol=4 * (0.25 / draws) ** 0.5)
    assert counts[3:].sum() == 0


def test_sampler_streams_depend_on_seed_and_sample() -> None:
    def draw(seed: int, sample: int) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed), sample)
        return [sampler.choose(_scores(0), ()) for _ in range(10)]

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(seed, sample)) for seed in (1, 2) for sample in (0, 1)}) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=1.0, top_p=0.9, seed=0)])
def test_sampler_refuses_logits_that_are_not_finite(bad: float, options: SamplingOptions) -> None:
    scores = _scores(0)
    scores[7] = bad
    with pytest.raises(BundleError, match="the model's logits hold"):
        Sampler(options).choose(scores, ())


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1e-40},
        {"temperature": float("inf")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "min_p": -0.1},
        {"temperature": 1.0, "min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"min_p": 0.1},
        {"temperature": 0.0, "top_p": 0.5},
    ],
)
def test_sampling_options_refuse_value_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=list(values)[-1]):
        SamplingOptions(**values)
