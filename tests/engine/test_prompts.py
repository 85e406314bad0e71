"""The prompts a verification runs on: text where there is a tokenizer, always of unequal length, always in range."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenforge.engine.prompts import LENGTHS, TEXTS, verification_prompts
from support.checkpoints import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder / "tokenizer.json"


def test_random_prompts_are_unequal_in_range_and_repeatable() -> None:
    prompts = verification_prompts(None, 320, 128)
    assert tuple(map(len, prompts)) == LENGTHS
    assert len(set(LENGTHS)) == 8 and 1 in LENGTHS
    assert all(0 <= token < 320 for prompt in prompts for token in prompt)
    assert len({token for prompt in prompts for token in prompt}) > 50
    assert verification_prompts(None, 320, 128) == prompts


def test_texts_are_encoded_by_the_tokenizer(tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer))
    prompts = verification_prompts(tokenizer, 320, 128)
    assert [backend.decode(prompt) for prompt in prompts] == list(TEXTS)
    assert len(set(map(len, prompts))) > 5 and min(map(len, prompts)) == 1


def test_tokens_beyond_the_vocabulary_are_left_out(tokenizer: Path) -> None:
    everything = verification_prompts(tokenizer, 320, 128)
    limited = verification_prompts(tokenizer, 80, 128)
    assert limited[0] == [token for token in everything[0] if token < 80] != everything[0]
    assert all(0 <= token < 80 for prompt in limited for token in prompt)


def test_text_without_a_token_in_range_becomes_random_tokens(tokenizer: Path) -> None:
    prompts = verification_prompts(tokenizer, 1, 128)
    assert prompts == verification_prompts(None, 1, 128)


@pytest.mark.parametrize("longest", [8, 1, 0])
def test_prompts_are_cut_to_the_longest_but_never_empty(tokenizer: Path, longest: int) -> None:
    for prompts in (verification_prompts(None, 320, longest), verification_prompts(tokenizer, 320, longest)):
        assert max(map(len, prompts)) == max(1, longest)
        assert all(prompts)
