"""One ONNX Runtime session over an exported graph, and steps bound to a cache.

A :class:`BoundStep` owns the small input arrays and the logits array of one shape and holds pointers into the
cache, for past and present alike: running it again copies nothing but what the caller writes into those arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenforge import names
from qwenforge.errors import BundleError, UserError
from qwenforge.runtime.kv_cache import CacheTensor, KeyValueCache

_STEP_INPUTS = (names.INPUT_IDS, names.POSITION_IDS, names.CACHE_POSITION, names.LOGITS_INDEX)
_FATAL = 4
_SIGNATURE = {
    names.INPUT_IDS: ("tensor(int64)", 2),
    names.POSITION_IDS: ("tensor(int64)", 2),
    names.CACHE_POSITION: ("tensor(int64)", 1),
    names.LOGITS_INDEX: ("tensor(int64)", 2),
    names.LOGITS: ("tensor(float)", 3),
}
_CACHE_DTYPES: dict[str, np.dtype[np.floating]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


class GraphSession:
    """An exported model in ONNX Runtime on the CPU.

    Args:
        model_path: the ONNX model, with the inputs and outputs of :mod:`qwenforge.names`.
        threads: intra-op threads; None lets ONNX Runtime choose (one a physical core).
        session_options: ONNX Runtime session configuration entries, such as ``session.disable_prepacking``.
        vocabulary_size: V, which the graph may leave symbolic.

    Raises:
        BundleError: the model cannot be loaded, or its signature is not the one of :mod:`qwenforge.names`, or it has
            another vocabulary.
        UserError: ``threads`` is less than 1.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        threads: int | None = None,
        session_options: Mapping[str, str] | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        import onnxruntime

        if threads is not None and threads < 1:
            raise UserError(f"threads is {threads}: give at least 1, or leave it out for one a physical core")
        self.model_path = Path(model_path)
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL  # what is wrong with a model is raised, and need not be logged beside it
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            for key, value in (session_options or {}).items():
                options.add_session_config_entry(key, value)
            self._session = onnxruntime.InferenceSession(
                str(self.model_path), options, providers=["CPUExecutionProvider"]
            )
        # ONNX Runtime's errors have no common base below Exception; the cause stays chained.
        except Exception as error:
            raise BundleError(
                f"{self.model_path}: ONNX Runtime cannot load the model: {_first_line(error)}; export the bundle again"
            ) from error
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        self._require_signature(inputs, outputs)
        self.cache_tensors, self.cache_dtype = self._read_cache_signature(inputs, outputs)
        self.vocabulary_size = self._read_vocabulary_size(outputs[names.LOGITS], vocabulary_size)
        capacity = inputs[self.cache_tensors[0].past_name].shape[2]
        self.fixed_capacity: int | None = capacity if isinstance(capacity, int) else None
        """M where the graph fixes it, else None: any capacity can be bound."""

    def _require_signature(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Refuse a graph without the step's inputs and logits, or with other types or numbers of dimensions of them."""
        values: dict[str, Any] = {name: inputs.get(name) for name in _STEP_INPUTS}
        values[names.LOGITS] = outputs.get(names.LOGITS)
        if missing := [name for name, value in values.items() if value is None]:
            raise BundleError(f"{self.model_path}: the graph lacks {', '.join(missing)}; export the bundle again")
        for name, (kind, rank) in _SIGNATURE.items():
            found = values[name]
            if (found.type, len(found.shape)) != (kind, rank):
                raise BundleError(
                    f"{self.model_path}: {name} is {found.type} of {len(found.shape)} dimensions, not {kind} of "
                    f"{rank}; export the bundle again"
                )

    def _read_cache_signature(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> tuple[tuple[CacheTensor, ...], np.dtype[np.floating]]:
        tensors: list[CacheTensor] = []
        types: set[str] = set()
        layer = 0
        while names.past_key(layer) in inputs:
            pairs = (
                (names.past_key(layer), names.present_key(layer)),
                (names.past_value(layer), names.present_value(layer)),
            )
            for past, present in pairs:
                if past not in inputs or present not in outputs:
                    raise BundleError(f"{self.model_path}: the graph lacks {past} or {present}; export it again")
                shape = inputs[past].shape
                if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in (shape[1], shape[3])):
                    raise BundleError(
                        f"{self.model_path}: {past} has the shape {shape}, not [batch, heads, capacity, head size] "
                        "with numbers for heads and head size; export the bundle again"
                    )
                tensors.append(CacheTensor(past, present, shape[1], shape[3]))
                types.add(inputs[past].type)
            layer += 1
        unknown = sorted(set(inputs) - set(_STEP_INPUTS) - {tensor.past_name for tensor in tensors})
        if unknown or not tensors:
            found = f"unknown inputs {', '.join(unknown)}" if unknown else f"no input {names.past_key(0)}"
            raise BundleError(f"{self.model_path}: the graph has {found}; it was not written by qwenforge export")
        if len(types) != 1 or not types <= _CACHE_DTYPES.keys():
            raise BundleError(
                f"{self.model_path}: the cache is {', '.join(sorted(types))}, ONNX Runtime on the CPU runs float or "
                "float16; export with --dtype fp32"
            )
        return tuple(tensors), _CACHE_DTYPES[types.pop()]

    def _read_vocabulary_size(self, logits: Any, fallback: int | None) -> int:
        size = logits.shape[-1] if isinstance(logits.shape[-1], int) else fallback
        if size is None:
            raise BundleError(f"{self.model_path}: neither the graph nor the manifest says the vocabulary size")
        if fallback not in (None, size):
            raise BundleError(
                f"{self.model_path}: the graph's logits have {size} columns, the manifest says {fallback}; "
                "export the bundle again"
            )
        return int(size)

    def new_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """Allocate a cache of ``batch`` rows of ``capacity`` tokens."""
        return KeyValueCache(self.cache_tensors, batch=batch, capacity=capacity, dtype=self.cache_dtype)

    def bind(
        self, cache: KeyValueCache, *, first_row: int, batch: int, new_tokens: int, logits_count: int
    ) -> BoundStep:
        """A step of ``new_tokens`` tokens for ``batch`` rows of ``cache`` that begin at ``first_row``."""
        step = (cache, first_row, batch, new_tokens, logits_count)
        return BoundStep(self._session, self.model_path, self.vocabulary_size, *step)


class BoundStep:
    """Arrays of one step shape, bound once; write the inputs, call :meth:`run`, read ``logits``.

    Attributes:
        input_ids: [B, S] int64.
        position_ids: [B, S] int64.
        cache_position: [B] int64.
        logits_index: [B, N] int64.
        logits: [B, N, V] fp32, overwritten by every run.
    """

    def __init__(
        self,
        session: Any,
        model_path: Path,
        vocabulary_size: int,
        cache: KeyValueCache,
        first_row: int,
        batch: int,
        new_tokens: int,
        logits_count: int,
    ) -> None:
        self._session = session
        self._model_path = model_path
        self._cache = cache
        self.input_ids: NDArray[np.int64] = np.zeros((batch, new_tokens), np.int64)
        self.position_ids: NDArray[np.int64] = np.zeros((batch, new_tokens), np.int64)
        self.cache_position: NDArray[np.int64] = np.zeros(batch, np.int64)
        self.logits_index: NDArray[np.int64] = np.zeros((batch, logits_count), np.int64)
        self.logits: NDArray[np.float32] = np.empty((batch, logits_count, vocabulary_size), np.float32)
        self._binding = session.io_binding()
        inputs = (self.input_ids, self.position_ids, self.cache_position, self.logits_index)
        for name, array in zip(_STEP_INPUTS, inputs, strict=True):
            self._bind(self._binding.bind_input, name, array)
        for tensor in cache.tensors:
            rows = cache.rows(tensor, first_row, batch)
            self._bind(self._binding.bind_input, tensor.past_name, rows)
            self._bind(self._binding.bind_output, tensor.present_name, rows)
        self._bind(self._binding.bind_output, names.LOGITS, self.logits)

    @staticmethod
    def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
        bind(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)

    def advance_positions(self, starts: NDArray[np.int64]) -> None:
        """Set ``cache_position`` to ``starts`` [B] and ``position_ids`` to the S positions from there.

        Raises:
            ValueError: a row's new tokens, padding included, would be written behind the cache's end.
        """
        new_tokens = self.input_ids.shape[1]
        last = int(starts.max()) + new_tokens
        if last > self._cache.capacity:
            raise ValueError(f"a step to position {last} overruns a cache of {self._cache.capacity} tokens")
        self.cache_position[:] = starts
        self.position_ids[:] = starts[:, None] + np.arange(new_tokens)

    def run(self) -> NDArray[np.float32]:
        """Run the graph: the cache is updated in place; returns ``logits`` (the reused array).

        Raises:
            BundleError: the graph fails, as one whose shapes are not what its signature says does.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        # As when loading: no common base below Exception.
        except Exception as error:
            raise BundleError(
                f"{self._model_path}: ONNX Runtime cannot run the model: {_first_line(error)}; export the bundle again"
            ) from error
        return self.logits


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:400] if text else type(error).__name__
