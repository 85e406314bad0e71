"""Run an exported model step by step for verification: whole, or one piece at a time.

This is not the runtime: caches are passed as plain arrays and nothing is tuned. Weights stay in the data file and are
mapped, so that a piece's memory is given back when its session goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge import names
from qwenforge.engine.cpu_library import library_of
from qwenforge.engine.free_memory import give_back_freed_memory
from qwenforge.engine.session_choice import AS_WRITTEN, MAPPED_WEIGHTS
from qwenforge.engine.weight_inputs import attach_weight_inputs
from qwenforge.graph_passes.execution import upcast_to_float32
from qwenforge.graph_passes.lower.reference_bodies import expand_target_nodes
from qwenforge.graph_passes.segments import split_by_layer

Array = npt.NDArray[np.generic]

_FP8 = "tensor(float8e4m3fn)"


class StepExecutor:
    """An ONNX model in the in-place form, with its caches, called like :class:`~qwenforge.engine.reference.Reference`.

    Nodes that ONNX Runtime has no kernels for, TensorRT's and our plugins', run from their reference bodies. Weights
    that are inputs of the graph come from the bundle's file of weights.

    Args:
        path: ``model.onnx`` beside its data file.
        batch, capacity: sizes of the caches.
        whole: keep one session; otherwise make a session for each layer's piece, call by call.
        upcast: compute in fp32 what the model computes in 16 bits.

    Attributes:
        rotary_is_rounded: the model holds its rotary tables in 16 bits, which ``upcast`` cannot undo.
    """

    def __init__(self, path: Path, *, batch: int, capacity: int, whole: bool, upcast: bool = False) -> None:
        model = ir.load(path)  # locations stay relative, as ONNX Runtime wants them; no value is read
        changed = attach_weight_inputs(model, path.parent)
        changed = expand_target_nodes(model) or changed or upcast
        if upcast:
            upcast_to_float32(model, cast_weights_in_graph=True)
        self.rotary_is_rounded = any(
            name.startswith("rope.") and value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
            for name, value in model.graph.initializers.items()
        )
        self._folder = path.parent
        self._caches: dict[str, Array] = {}
        for value in model.graph.inputs:
            if value.name and value.name.startswith("past_key_values."):
                assert value.shape is not None and value.dtype is not None
                shape = (batch, int(value.shape[1]), capacity, int(value.shape[3]))  # type: ignore[arg-type]
                self._caches[value.name] = np.zeros(shape, value.dtype.numpy())
        self._library = library_of(model)
        self._pieces: list[ir.Model] = [] if whole else split_by_layer(model)
        self._session = (self._saved(model, "whole") if changed else self._opened(path)) if whole else None

    def __call__(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        cache_position: npt.NDArray[np.int64],
        logits_index: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Logits [B, N, V] of the chosen ones among ``tokens`` [B, S], written to the caches at ``cache_position``."""
        values: dict[str, Array] = {
            names.INPUT_IDS: tokens,
            names.POSITION_IDS: positions,
            names.CACHE_POSITION: cache_position,
            names.LOGITS_INDEX: logits_index,
            **self._caches,
        }
        # ONNX Runtime's CPU attention takes several tokens against a part-filled cache for one row at a time only.
        alone = tokens.shape[1] > 1 and bool(cache_position.any())
        rows = [{name: array[row : row + 1] for name, array in values.items()} for row in range(len(tokens))]
        groups = rows if alone else [values]
        if self._session is not None:
            for group in groups:
                group |= run_session(self._session, group)
        for index, piece in enumerate(self._pieces):
            self._run_piece(piece, index, groups)
        outputs = [name.replace("past_key_values.", "present.") for name in self._caches]
        joined = {name: np.concatenate([group[name] for group in groups]) for name in (*outputs, names.LOGITS)}
        self._caches = {past: joined[present] for past, present in zip(self._caches, outputs, strict=True)}
        return joined[names.LOGITS].astype(np.float32)

    def _run_piece(self, piece: ir.Model, index: int, groups: list[dict[str, Array]]) -> None:
        session = self._saved(piece, f"piece-{index}")
        for group in groups:
            group |= run_session(session, group)
        del session
        give_back_freed_memory()

    def _saved(self, model: ir.Model, name: str) -> Any:
        """A session of ``model``, which lies beside the data file for as long as it is being read."""
        path = self._folder / f".verify-{name}.onnx"
        try:
            ir.save(model, path)
            return self._opened(path)
        finally:
            path.unlink(missing_ok=True)

    def _opened(self, path: Path) -> Any:
        return open_session(path, library=self._library)


def open_session(path: Path, options: Mapping[str, str] = MAPPED_WEIGHTS, *, library: Path | None = None) -> Any:
    """A session of the model at ``path`` on the CPU.

    Args:
        path: the model.
        options: configuration entries.
        library: of our ops, where the model has some (``cpu_library.library_of``).
    """
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    # Spinning threads would take the processor from the reference, which runs in turns with this.
    for name, value in {"session.intra_op.allow_spinning": "0", **AS_WRITTEN, **options}.items():
        session_options.add_session_config_entry(name, value)
    if library is not None:
        session_options.register_custom_ops_library(str(library))
    session_options.enable_cpu_mem_arena = False
    session_options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])


def run_session(session: Any, values: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of ``session`` by name; ``values`` may hold more than its inputs."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    feeds = {item.name: values[item.name] for item in inputs}
    names_of_outputs = [item.name for item in outputs]
    if all(item.type != _FP8 for item in inputs):
        return dict(zip(names_of_outputs, session.run(names_of_outputs, feeds), strict=True))
    bound = {name: _ort_value(array) for name, array in feeds.items()}
    found = session.run_with_ort_values(names_of_outputs, bound)
    return {item.name: _array(value, item.type) for item, value in zip(outputs, found, strict=True)}


def _ort_value(array: Array) -> Any:
    """``array`` for ONNX Runtime, which takes FP8 from bytes alone."""
    import ml_dtypes
    import onnxruntime

    if array.dtype != ml_dtypes.float8_e4m3fn:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), ir.DataType.FLOAT8E4M3FN.value)


def _array(value: Any, kind: str) -> Array:
    import ml_dtypes

    array: Array = value.numpy()
    return array.view(ml_dtypes.float8_e4m3fn) if kind == _FP8 else array
