"""Run a model over windows of text from an empty cache: whole, or one piece's weights in memory at a time.

Every window runs by itself, so that the experts' reference body, which computes every expert for every token, needs
memory for one window's tokens. The vocabulary projection, in the last piece, runs window by window as well: logits of
all windows at once would outweigh the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge import names
from qwenforge.engine.cpu_library import library_of
from qwenforge.engine.executor import open_session, run_session
from qwenforge.engine.free_memory import give_back_freed_memory
from qwenforge.engine.session_choice import MAPPED_WEIGHTS
from qwenforge.engine.weight_inputs import attach_weight_inputs
from qwenforge.exporter.external_data import save_model
from qwenforge.graph_passes.execution import half_types, upcast_to_float32, widen_float8_caches
from qwenforge.graph_passes.lower.reference_bodies import expand_target_nodes
from qwenforge.graph_passes.segments import split_by_layer

Array = npt.NDArray[Any]
Windows = npt.NDArray[np.int64]
"""Tokens [B, S]: B windows of S tokens."""

_LAYER = re.compile(r"^(model\.layers\.\d+)\.")


class Piece:
    """Part of a model that runs by itself.

    Attributes:
        layer: ``model.layers.3``; None for what precedes the layers, the rest, or a whole model.
    """

    def __init__(self, model: ir.Model, *, streamed: bool, options: Mapping[str, str], folder: Path) -> None:
        self.model = model
        self._options = options
        self._library = library_of(model)
        self._streamed = streamed
        self._folder = folder
        found = (_LAYER.match(node.name or "") for node in model.graph)
        layers = {match[1] for match in found if match is not None}
        self.layer = layers.pop() if len(layers) == 1 else None

    @property
    def hidden(self) -> str | None:
        """The name of the residual stream that leaves the layer; None where it is no layer of the portable form."""
        found = [str(value.name) for value in self.model.graph.outputs if not str(value.name).startswith("present.")]
        return found[0] if self.layer is not None and len(found) == 1 else None

    @property
    def inputs(self) -> set[str]:
        """Names of what it reads, caches included."""
        return {str(value.name) for value in self.model.graph.inputs}

    @contextmanager
    def session(self) -> Iterator[Any]:
        """An ONNX Runtime session of the piece, whose memory is given back at the end."""
        path = self._folder / f".accuracy-{id(self):x}.onnx"
        data = path.with_name(path.name + ".data")
        try:
            if self._streamed:
                save_model(self.model, path)
            else:
                ir.save(self.model, path)
            session = open_session(path, self._options, library=self._library)
        finally:
            path.unlink(missing_ok=True)
            data.unlink(missing_ok=True)  # what a session has mapped stays readable
        try:
            yield session
        finally:
            del session
            give_back_freed_memory()

    def run(self, session: Any, values: dict[str, Array], wanted: set[str]) -> dict[str, Array]:
        """The ``wanted`` ones of the piece's outputs for one window, from an empty cache of the window's length."""
        capacity = values[names.INPUT_IDS].shape[1]
        caches = {
            str(value.name): _empty(value, capacity)
            for value in self.model.graph.inputs
            if str(value.name).startswith("past_key_values.")
        }
        found = run_session(session, {**values, **caches})
        return {name: array for name, array in found.items() if name in wanted}


class WindowRunner:
    """A model in the in-place form, whole or in pieces.

    Args:
        model: the model; lazy weights are streamed to ``folder`` when a piece needs them, unless they lie there.
        folder: where pieces are written while they are being read; for a model from a file, the folder of its data.
        whole: in one piece.
        streamed: False where every large weight is in a file of ``folder`` already.
        options: session configuration.
    """

    def __init__(
        self,
        model: ir.Model,
        folder: Path,
        *,
        whole: bool,
        streamed: bool = True,
        options: Mapping[str, str] = MAPPED_WEIGHTS,
    ) -> None:
        models = [model] if whole else split_by_layer(model)
        self.pieces = [Piece(piece, streamed=streamed, options=options, folder=folder) for piece in models]

    @classmethod
    def from_file(
        cls, path: Path, *, whole: bool, upcast: bool = False, options: Mapping[str, str] = MAPPED_WEIGHTS
    ) -> WindowRunner:
        """The model at ``path``; nodes of TensorRT and of our plugins run from their reference bodies.

        Args:
            path: ``model.onnx`` beside its data.
            whole: in one piece.
            upcast: compute in fp32 what the model computes in 16 bits.
            options: session configuration.
        """
        model = ir.load(path)
        attach_weight_inputs(model, path.parent)
        expand_target_nodes(model)
        if upcast:
            upcast_to_float32(model, cast_weights_in_graph=True)
        widen_float8_caches(model)
        return cls(model, path.parent, whole=whole, streamed=False, options=options)

    @classmethod
    def in_fp32(cls, model: ir.Model, folder: Path) -> WindowRunner:
        """``model`` in pieces and in fp32 arithmetic, its lazy weights streamed to ``folder``; it is changed."""
        if half_types(model):
            upcast_to_float32(model)
        widen_float8_caches(model)
        return cls(model, folder, whole=False)

    @classmethod
    def of_pieces(cls, pieces: Sequence[Piece]) -> WindowRunner:
        """A model put together of pieces that follow on each other."""
        runner = cls.__new__(cls)
        runner.pieces = list(pieces)
        return runner

    def logits(self, windows: Windows) -> Iterator[npt.NDArray[np.float32]]:
        """Logits [S, V] of each of ``windows``, one after the other; all but the last piece runs before the first."""
        return self.logits_from(0, window_values(windows))

    def logits_from(self, index: int, rows: list[dict[str, Array]]) -> Iterator[npt.NDArray[np.float32]]:
        """Logits [S, V] of each of ``rows``, which hold what pieces from ``index`` on need."""
        for each in range(index, len(self.pieces) - 1):
            self.run_piece(each, rows)
        last = self.pieces[-1]
        with last.session() as session:
            for row in rows:
                yield last.run(session, row, {names.LOGITS})[names.LOGITS][0].astype(np.float32)

    def run_piece(self, index: int, rows: list[dict[str, Array]]) -> None:
        """Run a piece on each of ``rows``, in place: what no later piece needs is dropped."""
        piece, needed = self.pieces[index], self.needed_after(index)
        with piece.session() as session:
            for row in rows:
                row |= piece.run(session, row, needed)
                for name in row.keys() - needed:
                    del row[name]

    def needed_after(self, index: int) -> set[str]:
        """Names of the values that pieces behind number ``index`` read, and of the graph's inputs."""
        return set(_INPUTS).union(*(piece.inputs for piece in self.pieces[index + 1 :]))


_INPUTS = (names.INPUT_IDS, names.POSITION_IDS, names.CACHE_POSITION, names.LOGITS_INDEX)


def window_values(windows: Windows) -> list[dict[str, Array]]:
    """The graph's inputs for each window by itself, [1, S], asking for logits at every position."""
    positions = np.arange(windows.shape[1], dtype=np.int64)[None]
    return [
        {
            names.INPUT_IDS: window[None],
            names.POSITION_IDS: positions,
            names.CACHE_POSITION: np.zeros(1, np.int64),
            names.LOGITS_INDEX: positions,
        }
        for window in windows
    ]


def _empty(value: ir.Value, capacity: int) -> Array:
    assert value.shape is not None and value.dtype is not None
    _, heads, _, size = value.shape
    return np.zeros((1, int(heads), capacity, int(size)), value.dtype.numpy())  # type: ignore[arg-type]
