"""Held-out text: windows of it, and none of the text that the model was calibrated on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwenforge.calibration.data import load_calibration_data
from qwenforge.calibration.heldout import WINDOW, HeldOutText, load_heldout, overlapping_windows
from qwenforge.errors import UserError
from qwenforge.exporter.checkpoint import Checkpoint
from support.source_tree import ROOT

VOCABULARY = 2048


@pytest.fixture(scope="module")
def tokenizer() -> dict[str, Path]:
    return dict(Checkpoint.open(ROOT / "examples/checkpoints/tiny-qwen2").tokenizer_files)


def test_built_in_sample_shares_no_window_with_the_built_in_calibration_sample(tokenizer: dict[str, Path]) -> None:
    calibration = load_calibration_data(None, tokenizer, vocab_size=VOCABULARY, rows=100_000, row_length=512)
    text = load_heldout(
        None, tokenizer, vocab_size=VOCABULARY, max_length=2048, calibration=calibration.tokens, windows=10_000
    )
    assert text.overlapping == 0
    assert len(text.windows) > 60 and text.windows.shape[1] == WINDOW


def test_windows_are_the_same_every_time_and_fit_the_context(tokenizer: dict[str, Path]) -> None:
    first, second = (load_heldout(None, tokenizer, vocab_size=VOCABULARY, max_length=100) for _ in range(2))
    assert first.windows.shape == (16, 100)
    assert np.array_equal(first.windows, second.windows)


def test_windows_of_calibration_text_are_found_by_runs_of_tokens() -> None:
    generator = np.random.default_rng(3)
    windows = generator.integers(0, 2000, (6, 64))
    row = generator.integers(0, 2000, 300)
    row[50:82] = windows[2, 10:42]  # 32 tokens in a row
    row[100:131] = windows[4, 5:36]  # 31
    assert overlapping_windows(windows, [row[:45], row]).tolist() == [False, False, True, False, False, False]


def test_nothing_overlaps_without_calibration() -> None:
    assert not overlapping_windows(np.zeros((3, 64), np.int64), []).any()


def test_calibration_text_is_refused_as_held_out_text(tokenizer: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text((ROOT / "examples/checkpoints/heldout.txt").read_text()[:20_000])
    calibration = load_calibration_data(path, tokenizer, vocab_size=VOCABULARY, row_length=256)
    with pytest.raises(UserError, match=r"hold text that the model was calibrated on.*--heldout-data"):
        load_heldout(path, tokenizer, vocab_size=VOCABULARY, max_length=2048, calibration=calibration.tokens)


def test_a_few_overlapping_windows_are_left_out_and_counted(tokenizer: dict[str, Path]) -> None:
    clean = load_heldout(None, tokenizer, vocab_size=VOCABULARY, max_length=2048)
    text = load_heldout(None, tokenizer, vocab_size=VOCABULARY, max_length=2048, calibration=clean.windows[3:4])
    assert 1 <= text.overlapping < 6  # Python's documentation repeats a paragraph here and there
    assert not overlapping_windows(text.windows, clean.windows[3:4]).any()


def test_text_of_five_tokens_is_refused(tokenizer: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("five tokens")
    with pytest.raises(UserError, match=r"--heldout-data .*short.txt is no text to judge the model by"):
        load_heldout(path, tokenizer, vocab_size=VOCABULARY, max_length=2048)


def test_text_of_one_window_is_refused(tokenizer: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text((ROOT / "examples/checkpoints/heldout.txt").read_text()[:1100])
    with pytest.raises(UserError, match=r"too few to judge a model by; give at least 512"):
        load_heldout(path, tokenizer, vocab_size=VOCABULARY, max_length=2048)


def test_tokenizer_of_another_model_is_refused(tokenizer: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="another model's tokenizer"):
        load_heldout(None, tokenizer, vocab_size=320, max_length=2048)


def test_halves_have_no_window_in_common() -> None:
    text = HeldOutText(np.arange(50).reshape(5, 10), "text")
    choosing, judging = text.halves()
    assert choosing.windows[:, 0].tolist() == [0, 20, 40] and judging.windows[:, 0].tolist() == [10, 30]
    with pytest.raises(UserError, match="--auto needs two"):
        HeldOutText(np.zeros((1, 10), np.int64), "text").halves()
