"""The trained example checkpoints as portable models, and how far a changed model's predictions are from theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge import names
from qwenforge.calibration.data import CalibrationData, load_calibration_data
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.instantiate import instantiate
from qwenforge.exporter.trace import trace
from qwenforge.graph_passes.execution import Executable
from qwenforge.graph_passes.pipeline import optimize

Array = npt.NDArray[Any]

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
WINDOW = 256


@functools.cache
def _template(name: str) -> tuple[Checkpoint, Any, ir.Model]:
    checkpoint = Checkpoint.open(CHECKPOINTS / name)
    traced = trace(checkpoint, ir.DataType.FLOAT)
    return checkpoint, traced, optimize(traced.model, positions=1024).model


def trained_checkpoint(name: str) -> Checkpoint:
    """``tiny-qwen2`` or ``tiny-qwen2-moe``."""
    return _template(name)[0]


def trained_model(name: str, checkpoint: Checkpoint | None = None) -> ir.Model:
    """A new portable model in fp32; of another checkpoint of the same architecture, where one is given."""
    own, traced, fused = _template(name)
    return instantiate(fused, traced, checkpoint or own)


def calibration_rows(name: str, rows: int = 16, length: int = WINDOW) -> CalibrationData:
    """Rows of the built-in sample."""
    checkpoint = trained_checkpoint(name)
    files, vocab = checkpoint.tokenizer_files, checkpoint.config.vocab_size
    return load_calibration_data(None, files, vocab_size=vocab, rows=rows, row_length=length)


def heldout_rows(name: str, rows: int = 8) -> Array:
    """[rows, 256] tokens of ``heldout.txt``."""
    checkpoint = trained_checkpoint(name)
    files, vocab = checkpoint.tokenizer_files, checkpoint.config.vocab_size
    path = CHECKPOINTS / "heldout.txt"
    return load_calibration_data(path, files, vocab_size=vocab, rows=rows, row_length=WINDOW).tokens


def logits(model: ir.Model, tokens: Array) -> Array:
    """[rows * length, V] of a portable model, run in ONNX Runtime without optimizations."""
    rows, length = tokens.shape
    feeds: dict[str, Array] = {
        names.INPUT_IDS: tokens,
        names.POSITION_IDS: np.tile(np.arange(length), (rows, 1)),
        names.CACHE_POSITION: np.zeros(rows, np.int64),
        names.LOGITS_INDEX: np.tile(np.arange(length), (rows, 1)),
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("past_key_values."):
            assert value.shape is not None
            feeds[str(value.name)] = np.zeros((rows, int(value.shape[1]), length, int(value.shape[3])), np.float32)  # type: ignore[arg-type]
    (found,) = Executable(model).run(feeds, [names.LOGITS])
    return found.reshape(-1, found.shape[-1])


def mean_kl(expected: Array, actual: Array) -> float:
    """Mean KL(expected || actual) of next-token distributions given as logits [N, V], in nats."""
    left, right = (_log_softmax(each.astype(np.float64)) for each in (expected, actual))
    return float((np.exp(left) * (left - right)).sum(-1).mean())


def kl_after(name: str, change: Callable[[ir.Model], None]) -> float:
    """Mean KL on held-out text of the model that ``change`` is done to, from the model as it is."""
    changed = trained_model(name)
    change(changed)
    return mean_kl(float_logits(name), logits(changed, heldout_rows(name)))


@functools.cache
def float_logits(name: str) -> Array:
    """Of the unchanged model, on held-out text."""
    return logits(trained_model(name), heldout_rows(name))


def _log_softmax(values: Array) -> Array:
    shifted = values - values.max(-1, keepdims=True)
    normalized: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized
