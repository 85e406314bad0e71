"""The recipe that made the example checkpoints: its command line, its data and its care with folders."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def recipe_module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(f"tiny.{name}")


def run_recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "train_tiny.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_ends_with_an_example() -> None:
    result = run_recipe("--help")
    assert result.returncode == 0
    assert result.stdout.rstrip().endswith("python examples/train_tiny.py --model dense -o my-checkpoints")


def test_existing_checkpoint_folder_is_refused_before_training(tmp_path: Path) -> None:
    foreign = tmp_path / "tiny-qwen2" / "notes.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    result = run_recipe("--model", "dense", "-o", str(tmp_path))
    assert result.returncode == 1
    assert "tiny-qwen2 exists" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [foreign]


def test_held_out_paragraphs_occur_in_no_training_document(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus_module = recipe_module("corpus", monkeypatch)
    chat = recipe_module("chat", monkeypatch)
    corpus = corpus_module.build_corpus(seed=2)

    def paragraphs(texts: list[str]) -> set[str]:
        joined = (" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n"))
        return {paragraph for paragraph in joined if len(paragraph) >= 60}

    documents = [text for kind in corpus.training.values() for text in kind]
    held_out = paragraphs(corpus.held_out)
    assert len(held_out) > 100
    assert held_out.isdisjoint(paragraphs(documents + chat.chat_samples(corpus.entries, 2)))


def test_every_training_window_starts_where_a_piece_of_a_document_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    training = recipe_module("training", monkeypatch)
    documents = [[1000 + index, *range(length)] for index, length in enumerate((3, 50, 254, 120))]
    batch = next(training.batches(documents, batch_size=6, seed=0))
    assert batch.shape == (6, training.WINDOW)
    assert (batch[:, 0] >= 1000).all()


def test_failed_writing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = recipe_module("writing", monkeypatch)
    tokenizer = recipe_module("tokenizer", monkeypatch).train_tokenizer(["some text to merge"], 270)
    model = recipe_module("models", monkeypatch).build_dense(tokenizer)
    with pytest.raises(TypeError, match="not JSON serializable"):
        writing.write_checkpoint(tmp_path / "tiny", model, tokenizer, {"report": object()}, "8MB")
    assert list(tmp_path.iterdir()) == []
