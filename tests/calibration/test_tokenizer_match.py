"""A tokenizer of another model is told by its size, its numbers and its special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenforge.calibration.tokenizer_match import tokenizer_doubts
from qwenforge.exporter.checkpoint import Checkpoint
from support.source_tree import ROOT

NAMES = ("tiny-qwen2", "tiny-qwen2-moe")
END = "<|im_end|>"


def files_of(name: str) -> dict[str, Path]:
    return dict(Checkpoint.open(ROOT / "examples/checkpoints" / name).tokenizer_files)


def changed(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "tokenizer.json") -> dict[str, Path]:
    """The tokenizer's files with one of them changed."""
    files = files_of("tiny-qwen2")
    content = json.loads(files[name].read_text(encoding="utf-8"))
    change(content)
    copy = Path(shutil.copy(files[name], folder / name))
    copy.write_text(json.dumps(content), encoding="utf-8")
    return files | {name: copy}


def without_end(content: dict[str, Any]) -> None:
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] != END]
    content["model"]["vocab"].pop(END, None)


@pytest.mark.parametrize("name", NAMES)
def test_own_tokenizer_raises_no_doubt(name: str) -> None:
    checkpoint = Checkpoint.open(ROOT / "examples/checkpoints" / name)
    ends = checkpoint.config.eos_token_ids
    assert ends and tokenizer_doubts(checkpoint.tokenizer_files, checkpoint.config.vocab_size, ends) == []


def test_padded_vocabulary_raises_no_doubt() -> None:
    assert tokenizer_doubts(files_of("tiny-qwen2"), 2048 + 128, [2047]) == []


def test_tokens_that_the_model_lacks_are_told() -> None:
    (doubt,) = tokenizer_doubts(files_of("tiny-qwen2"), 1024, [2047])
    assert doubt.startswith("the tokenizer has 2048 tokens up to number 2047, the model 1024")


def test_tokenizer_for_a_part_of_the_vocabulary_is_told() -> None:
    (doubt,) = tokenizer_doubts(files_of("tiny-qwen2"), 151936, [2047])
    assert doubt.startswith("the tokenizer has 2048 tokens, the model 151936")


def test_missing_special_token_is_told(tmp_path: Path) -> None:
    doubts = tokenizer_doubts(changed(tmp_path, without_end), 2048, [2047])
    assert any(f"does not know '{END}'" in doubt and "eos_token" in doubt for doubt in doubts)


def test_end_token_of_another_number_is_told() -> None:
    (doubt,) = tokenizer_doubts(files_of("tiny-qwen2"), 2048, [7])
    assert "and the model's texts end with 7" in doubt


def test_model_without_end_tokens_and_without_tokenizer_raise_no_doubt() -> None:
    assert tokenizer_doubts(files_of("tiny-qwen2"), 2048, []) == []
    assert tokenizer_doubts({}, 2048, [7]) == []
