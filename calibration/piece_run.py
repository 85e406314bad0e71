"""Running one piece of a model on every calibration row, and what is kept of its values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge import names
from qwenforge.calibration.fluency import losses
from qwenforge.calibration.pieces import RunnablePiece
from qwenforge.calibration.progress import Meter
from qwenforge.calibration.spill import SpilledValue
from qwenforge.errors import GraphError, UserError

Array = npt.NDArray[Any]

_LOGITS_TOKENS = 64
"""Tokens that are projected onto the vocabulary at once."""
_LOSS_ROWS = 8
"""Rows whose loss is measured, where the vocabulary projection is not calibrated."""


@dataclass
class PieceValues:
    """What a run gave.

    Attributes:
        spilled: by value name; what was asked for and this piece makes.
        rows: how many rows those hold.
        largest: by output name of a cache: the largest magnitude of each head and channel, [Hk, D].
        mean_loss: nats a token; None for a piece without logits.
    """

    spilled: dict[str, SpilledValue]
    rows: int
    largest: dict[str, Array] = field(default_factory=dict)
    mean_loss: float | None = None


@dataclass(frozen=True)
class PieceRun:
    """How to run one piece.

    Args:
        piece: its graph.
        runnable: the same, loaded.
        tokens: [R, L].
        before: values that earlier pieces left, by name.
        kept: names of the piece's values to keep, and for whom: what an error message calls them.
        caches: names of the cache outputs whose ranges are wanted.
        new_value: makes a file for the value of a name.
    """

    piece: ir.Model
    runnable: RunnablePiece
    tokens: Array
    before: Mapping[str, SpilledValue]
    kept: Mapping[str, str]
    caches: Sequence[str]
    new_value: Any

    def run(self, meter: Meter) -> PieceValues:
        """Run every row; only some where nothing but the loss is wanted.

        Raises:
            UserError: a value is NaN or infinite, or the disk is full.
        """
        measures_loss = names.LOGITS in self.runnable.outputs
        rows = list(range(len(self.tokens)))
        if measures_loss and not self.kept and not self.caches:
            rows = sorted(set(np.linspace(0, len(rows) - 1, min(len(rows), _LOSS_ROWS)).astype(int).tolist()))
        found = PieceValues({name: self.new_value(name) for name in self.kept}, len(rows))
        total: list[float] = []
        for row in rows:
            start = time.monotonic()
            if measures_loss:
                total.append(self._vocabulary_row(row, found))
            else:
                self._row(row, found)
            meter.ran(self.tokens.shape[1], time.monotonic() - start)
        for value in found.spilled.values():
            value.close()
        found.mean_loss = float(np.mean(total)) if total else None
        return found

    def _row(self, row: int, found: PieceValues) -> None:
        wanted = [*self.kept, *self.caches]
        outputs = self.runnable.run(self._feeds(row, np.zeros((1, 1), np.int64)), wanted)
        for name, value in zip(wanted, outputs, strict=True):
            self._take(name, value, row, found)

    def _take(self, name: str, value: Array, row: int, found: PieceValues) -> None:
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise UserError(
                f"{self.kept.get(name, name)} is NaN or infinite in calibration row {row}: the checkpoint is damaged, "
                "or its values leave fp32's range"
            )
        if name in self.kept:
            found.spilled[name].append(value)
        if name in self.caches:
            largest = np.abs(value).max(axis=(0, 2))
            before = found.largest.setdefault(name, np.zeros_like(largest))
            np.maximum(before, largest, out=before)

    def _vocabulary_row(self, row: int, found: PieceValues) -> float:
        """The mean loss of a row, whose logits are computed some tokens at a time."""
        length = self.tokens.shape[1]
        step = _LOGITS_TOKENS if names.LOGITS_INDEX in self.runnable.inputs else length
        parts: dict[str, list[Array]] = {}
        summed = 0.0
        wanted = [*self.kept, *self.caches, names.LOGITS]
        for start in range(0, length, step):
            index = np.arange(start, min(start + step, length))[None, :]
            outputs = dict(zip(wanted, self.runnable.run(self._feeds(row, index), wanted), strict=True))
            following = self.tokens[row, start + 1 : start + 1 + index.shape[1]]
            summed += float(losses(outputs.pop(names.LOGITS)[0, : len(following)], following).sum())
            for name, value in outputs.items():
                parts.setdefault(name, []).append(value)
        for name, pieces in parts.items():
            self._take(name, np.concatenate(pieces, axis=-2), row, found)
        return summed / float(length - 1)

    def _feeds(self, row: int, logits_index: Array) -> dict[str, Array]:
        length = self.tokens.shape[1]
        feeds: dict[str, Array] = {
            names.INPUT_IDS: self.tokens[row : row + 1],
            names.POSITION_IDS: np.arange(length, dtype=np.int64)[None, :],
            names.CACHE_POSITION: np.zeros(1, np.int64),
            names.LOGITS_INDEX: logits_index.astype(np.int64),
        }
        for value in self.piece.graph.inputs:
            name = str(value.name)
            if name in feeds:
                continue
            if name in self.before:
                feeds[name] = self.before[name].row(row)
            elif name.startswith("past_key_values."):
                feeds[name] = np.zeros(_cache_shape(value, length), np.float32)
            else:
                raise GraphError(f"the graph's input {name} is not of the portable form: calibrate a portable graph")
        return feeds


def _cache_shape(value: ir.Value, length: int) -> tuple[int, int, int, int]:
    """[1, Hk, ``length``, D]."""
    shape = list(value.shape) if value.shape is not None else []
    if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise GraphError(f"the cache {value.name} has no known number of heads and head size")
    return (1, shape[1], length, shape[3])
