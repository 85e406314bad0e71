from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenforge.errors import UserError
from qwenforge.runtime import LanguageModel, load

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (3, 40, 1, 17, 25, 9, 33, 2)]
Greedy = Callable[..., list[int]]


def test_greedy_equals_transformers_batch_of_unequal_lengths(model: LanguageModel, reference_greedy: Greedy) -> None:
    result = model.generate(PROMPTS, max_new_tokens=64, ignore_eos=True)
    assert [list(s.prompt_tokens) for s in result.sequences] == PROMPTS
    assert result.tokens == [reference_greedy(prompt, 64) for prompt in PROMPTS]
    assert {s.finish_reason for s in result.sequences} == {"length"}


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_greedy_unchanged_by_prefill_chunk(model: LanguageModel, chunk: int) -> None:
    expected = model.generate(PROMPTS, max_new_tokens=16).tokens
    model.prefill_chunk = chunk
    assert model.generate(PROMPTS, max_new_tokens=16).tokens == expected


def test_greedy_with_repetition_penalty_equals_transformers(model: LanguageModel, reference_greedy: Greedy) -> None:
    result = model.generate(PROMPTS[:3], max_new_tokens=32, repetition_penalty=1.3, ignore_eos=True)
    assert result.tokens == [reference_greedy(prompt, 32, repetition_penalty=1.3) for prompt in PROMPTS[:3]]


def test_generate_ends_rows_at_different_steps_when_eos_is_chosen(
    model: LanguageModel, reference_greedy: Greedy
) -> None:
    full = [reference_greedy(prompt, 64) for prompt in PROMPTS]
    # Make frequent tokens end-of-sequence tokens, so that rows end early, at different steps.
    tokens, counts = np.unique(np.concatenate(full), return_counts=True)
    ends = {int(token) for token in tokens[np.argsort(counts)[-4:]]}
    model.end_tokens = frozenset(ends)
    result = model.generate(PROMPTS, max_new_tokens=64)
    lengths = set()
    for sequence, expected in zip(result.sequences, full, strict=True):
        end = next((i for i, token in enumerate(expected) if token in ends), None)
        stop = 64 if end is None else end + 1
        assert list(sequence.tokens) == expected[:stop]
        assert sequence.finish_reason == ("length" if end is None else "stop")
        lengths.add(stop)
    assert len(lengths) > 3


def test_generate_in_turns_when_batch_is_limited(bundle: Path, model: LanguageModel) -> None:
    expected = model.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=1, n=2)
    limited = load(bundle, threads=2, max_batch=3)
    assert limited.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=1, n=2) == expected


def test_generate_ends_with_capacity_when_cache_is_full(bundle: Path, reference_greedy: Greedy) -> None:
    model = load(bundle, threads=2, max_length=45)
    result = model.generate([PROMPTS[1], PROMPTS[0]], max_new_tokens=100, ignore_eos=True)
    assert [s.finish_reason for s in result.sequences] == ["capacity", "capacity"]
    assert result.tokens == [reference_greedy(PROMPTS[1], 5), reference_greedy(PROMPTS[0], 42)]


def test_generate_fills_exported_capacity_exactly(bundle: Path, reference_greedy: Greedy) -> None:
    model = load(bundle, threads=2)
    prompt = (PROMPTS[1] * 7)[:250]
    sequence = model.generate(prompt, max_new_tokens=64, ignore_eos=True).sequences[0]
    assert sequence.finish_reason == "capacity"
    assert list(sequence.tokens) == reference_greedy(prompt, 6)


def test_samples_share_prompt_and_differ_when_n_is_given(model: LanguageModel) -> None:
    result = model.generate(PROMPTS[:2], max_new_tokens=12, temperature=1.0, seed=5, n=3)
    assert [list(s.prompt_tokens) for s in result.sequences] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len({s.tokens for s in result.sequences}) == 6
    # The copied cache rows are right: each sample equals the same sample generated without siblings in front.
    assert model.generate(PROMPTS[1], max_new_tokens=12, temperature=1.0, seed=5, n=3).tokens == result.tokens[3:]


def test_seeded_sample_is_independent_of_batch_mates(model: LanguageModel) -> None:
    alone = model.generate(PROMPTS[3], max_new_tokens=20, temperature=0.9, top_k=40, seed=11).tokens[0]
    together = model.generate(PROMPTS, max_new_tokens=20, temperature=0.9, top_k=40, seed=11).tokens
    assert together[3] == alone
    other = model.generate(PROMPTS[3], max_new_tokens=20, temperature=0.9, top_k=40, seed=12).tokens[0]
    assert other != alone


def test_unseeded_samples_differ(model: LanguageModel) -> None:
    first, second = (model.generate(PROMPTS[3], max_new_tokens=20, temperature=1.0).tokens for _ in range(2))
    assert first != second


def test_stream_pieces_add_up_to_generated_text(model: LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 2}
    expected = model.generate("héllo", **options).sequences[0]
    events = list(model.stream("héllo", **options))
    assert "".join(event.text for event in events) == expected.text
    assert expected.text == model.tokenizer.decode(expected.tokens)
    assert [event.token for event in events] == list(expected.tokens)
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == expected.finish_reason


def test_interleaved_streams_do_not_disturb_each_other(model: LanguageModel) -> None:
    expected = [model.generate(prompt, max_new_tokens=10).tokens[0] for prompt in PROMPTS[:2]]
    streams = zip(*(model.stream(prompt, max_new_tokens=10) for prompt in PROMPTS[:2]), strict=True)
    assert [list(tokens) for tokens in zip(*([e.token for e in events] for events in streams), strict=True)] == expected


def test_stop_string_ends_text_before_it(model: LanguageModel) -> None:
    free = model.generate("abc", max_new_tokens=60, temperature=1.0, seed=4, ignore_eos=True).sequences[0]
    position = len(free.text) // 2
    stop = free.text[position : position + 3]
    cut = free.text.index(stop)
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.0, "seed": 4, "ignore_eos": True, "stop": stop}
    stopped = model.generate("abc", **options).sequences[0]
    assert (stopped.text, stopped.finish_reason) == (free.text[:cut], "stop_string")
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    shown = ""
    for event in model.stream("abc", **options):
        shown += event.text
        assert stop not in shown and free.text.startswith(shown)


def test_prompt_forms_are_equivalent(model: LanguageModel) -> None:
    chat = [{"role": "user", "content": "hi"}]
    tokens = model.tokenizer.encode_chat(chat)
    expected = model.generate([tokens], max_new_tokens=4).sequences
    assert model.generate(chat, max_new_tokens=4).sequences == expected
    assert model.generate([chat], max_new_tokens=4).sequences == expected
    assert model.generate(tokens, max_new_tokens=4).sequences == expected
    assert model.generate([np.array(tokens)], max_new_tokens=4).sequences == expected  # type: ignore[list-item]
    assert model.generate("hi", max_new_tokens=4) == model.generate(["hi"], max_new_tokens=4)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "prompt 1 has no tokens"),
        (["a", ""], {}, "prompt 2 has no tokens"),
        ([], {}, "there is no prompt"),
        ([[]], {}, "prompt 1 has no tokens"),
        ([1] * 256, {}, "prompt 1 has 256 tokens, at most 255 fit a max_length of 256"),
        ([[5, 320]], {}, "prompt 1 holds a token outside 0 to 319"),
        ([[-1]], {}, "prompt 1 holds a token outside 0 to 319"),
        ([3.5], {}, "a prompt is float"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("a", {"n": 0}, "n is 0"),
        ("a", {"stop": ["x", ""]}, "a stop string is empty"),
        ("a", {"top_k": 5}, "top_k has no effect on greedy decoding"),
    ],
)
def test_generate_refuses_bad_request(model: LanguageModel, prompts: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.generate(prompts, **options)
    with pytest.raises(UserError, match=message):
        model.stream(prompts, **options)
