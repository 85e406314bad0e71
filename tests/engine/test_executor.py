"""An exported model run whole and piece by piece gives the same logits, and leaves nothing behind in the bundle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qwenforge.engine import executor
from qwenforge.engine.executor import StepExecutor
from support.tolerances import FLOAT32_MODEL

MODELS = [
    ("qwen2", "ort-cpu", "fp32"),
    ("qwen2", "portable", "fp32"),
    ("qwen2_moe", "ort-cpu", "fp32"),
    ("mixed", "portable", "bf16"),
    ("qwen2_moe", "ort-cpu", "fp16"),
]
CAPACITY = 24
PROMPT = 9


def run(model: StepExecutor, widths: tuple[int, ...]) -> list[npt.NDArray[np.float32]]:
    """Logits [2, width, V] of calls with ``widths`` seeded tokens, one behind the other, on two rows."""
    tokens = np.random.default_rng(1).integers(0, 320, (2, CAPACITY))
    start, found = 0, []
    for width in widths:
        span = np.tile(np.arange(start, start + width), (2, 1))
        index = np.tile(np.arange(width), (2, 1))
        found.append(model(tokens[:, start : start + width], span, np.full(2, start), index))
        start += width
    return found


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("kind", "target", "dtype"), MODELS)
def test_whole_and_piecewise_agree(exports: Any, kind: Any, target: str, dtype: str) -> None:
    export = exports(kind, target, dtype)
    before = sorted(path.name for path in export.bundle.iterdir())
    whole, pieces = (
        run(StepExecutor(export.model, batch=2, capacity=CAPACITY, whole=way, upcast=dtype != "fp32"), (PROMPT, 1, 3))
        for way in (True, False)
    )
    for expected, actual, width in zip(whole, pieces, (PROMPT, 1, 3), strict=True):
        assert expected.shape == (2, width, 320) and expected.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=FLOAT32_MODEL)
    assert sorted(path.name for path in export.bundle.iterdir()) == before


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "pieces"])
@pytest.mark.parametrize("target", ["ort-cpu", "portable"])
def test_several_tokens_against_the_cache_are_as_good_as_one_by_one(exports: Any, target: str, whole: bool) -> None:
    export = exports("qwen2", target, "fp32")
    calls = [
        run(StepExecutor(export.model, batch=2, capacity=CAPACITY, whole=whole), widths)
        for widths in ((PROMPT + 3,), (PROMPT, 3), (PROMPT, 1, 1, 1))
    ]
    once, *others = [np.concatenate(found, axis=1) for found in calls]
    for other in others:
        np.testing.assert_allclose(other, once, atol=FLOAT32_MODEL)


def test_only_the_chosen_positions_are_projected(exports: Any) -> None:
    model = exports("qwen2", "ort-cpu", "fp32").model
    tokens = np.random.default_rng(2).integers(0, 320, (2, 5))
    positions, start = np.tile(np.arange(5), (2, 1)), np.zeros(2, np.int64)
    every = StepExecutor(model, batch=2, capacity=8, whole=True)(tokens, positions, start, positions)
    index = np.array([[4, 0], [2, 2]])
    for whole in (True, False):
        chosen = StepExecutor(model, batch=2, capacity=8, whole=whole)(tokens, positions, start, index)
        np.testing.assert_allclose(chosen, np.take_along_axis(every, index[:, :, None], axis=1), atol=FLOAT32_MODEL)


def test_rows_of_unequal_length_continue_where_they_ended(exports: Any) -> None:
    """Row 1's padding is overwritten by its next token, as the portable form promises."""
    model = exports("qwen2_moe", "ort-cpu", "fp32").model
    tokens = np.random.default_rng(5).integers(0, 320, (2, 6))
    positions, index = np.tile(np.arange(6), (2, 1)), np.array([[5], [3]])
    both = StepExecutor(model, batch=2, capacity=8, whole=True)
    both(tokens, positions, np.zeros(2, np.int64), index)
    lengths = np.array([6, 4])
    together = both(np.array([[7], [8]]), lengths[:, None], lengths, np.zeros((2, 1), np.int64))
    alone = StepExecutor(model, batch=1, capacity=8, whole=True)
    row = np.array([[*tokens[1, :4], 8]])
    expected = alone(row, np.arange(5)[None], np.zeros(1, np.int64), np.array([[4]]))
    np.testing.assert_allclose(together[1], expected[0], atol=FLOAT32_MODEL)


def test_rotary_tables_are_known_to_be_rounded(exports: Any) -> None:
    def is_rounded(kind: str, target: str, dtype: str) -> bool:
        model = exports(kind, target, dtype).model
        return StepExecutor(model, batch=1, capacity=8, whole=False, upcast=dtype != "fp32").rotary_is_rounded

    assert is_rounded("qwen2", "ort-cpu", "fp16")
    assert not is_rounded("qwen2", "ort-cpu", "fp32")
    assert not is_rounded("mixed", "portable", "bf16")


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "pieces"])
def test_temporary_model_lies_beside_the_data_only_while_it_is_read(
    exports: Any, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = exports("mixed", "portable", "bf16")
    opened: list[tuple[str, bool, list[str]]] = []
    open_session = executor.open_session

    def session(path: Path, **options: Any) -> Any:
        opened.append((path.name, path.is_file(), left_behind(path.parent)))
        return open_session(path, **options)

    monkeypatch.setattr(executor, "open_session", session)
    run(StepExecutor(export.model, batch=2, capacity=CAPACITY, whole=whole, upcast=True), (PROMPT, 1))
    names = [".verify-whole.onnx"] if whole else [f".verify-piece-{index}.onnx" for _ in range(2) for index in range(4)]
    assert opened == [(name, True, [name]) for name in names]
    assert left_behind(export.bundle) == []


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "pieces"])
def test_nothing_is_left_behind_when_the_session_fails(exports: Any, tmp_path: Path, whole: bool) -> None:
    folder = tmp_path / "without_data"
    folder.mkdir()
    shutil.copy(exports("mixed", "portable", "bf16").model, folder)
    with pytest.raises(Exception, match=r"model\.onnx\.data"):
        run(StepExecutor(folder / "model.onnx", batch=2, capacity=CAPACITY, whole=whole, upcast=True), (PROMPT,))
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


def test_nothing_is_left_behind_when_the_disk_is_full(exports: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    export = exports("qwen2", "ort-cpu", "fp32")

    def save(model: Any, path: Path) -> None:
        path.write_bytes(b"half a mod")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(executor.ir, "save", save)
    with pytest.raises(OSError, match="No space left"):
        run(StepExecutor(export.model, batch=2, capacity=CAPACITY, whole=False), (PROMPT,))
    assert left_behind(export.bundle) == []
