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
        vocabulary_size: V, needed only when the graph's logits output leaves it symbolic.

    Raises:
        BundleError: the model cannot be loaded or its signature is not the one of :mod:`qwenforge.names`.
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
        if threads is not None:
            options.intra_op_num_threads = threads
        for key, value in (session_options or {}).items():
            options.add_session_config_entry(key, value)
        try:
            self._session = onnxruntime.InferenceSession(
                str(self.model_path), options, providers=["CPUExecutionProvider"]
            )
        # ONNX Runtime's errors have no common base below Exception; the cause stays chained.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BundleError(f"{self.model_path}: ONNX Runtime cannot load the model: {reason}") from error
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        self.cache_tensors, self.cache_dtype = self._read_cache_signature(inputs, outputs)
        self.vocabulary_size = self._read_vocabulary_size(outputs[names.LOGITS], vocabulary_size)
        capacity = inputs[self.cache_tensors[0].past_name].shape[2]
        self.fixed_capacity: int | None = capacity if isinstance(capacity, int) else None
        """M where the graph fixes it, else None: any capacity can be bound."""

    def _read_cache_signature(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> tuple[tuple[CacheTensor, ...], np.dtype[np.floating]]:
        missing = [name for name in _STEP_INPUTS if name not in inputs]
        missing += [name for name in (names.LOGITS,) if name not in outputs]
        if missing:
            raise BundleError(f"{self.model_path}: the graph lacks {', '.join(missing)}; export the bundle again")
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
                _, heads, _, head_size = inputs[past].shape
                tensors.append(CacheTensor(past, present, int(heads), int(head_size)))
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
        size = logits.shape[-1] if logits.shape and isinstance(logits.shape[-1], int) else fallback
        if size is None:
            raise BundleError(f"{self.model_path}: neither the graph nor the manifest says the vocabulary size")
        return int(size)

    def new_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """Allocate a cache of ``batch`` rows of ``capacity`` tokens."""
        return KeyValueCache(self.cache_tensors, batch=batch, capacity=capacity, dtype=self.cache_dtype)

    def bind(
        self, cache: KeyValueCache, *, first_row: int, batch: int, new_tokens: int, logits_count: int
    ) -> BoundStep:
        """A step of ``new_tokens`` tokens for ``batch`` rows of ``cache`` that begin at ``first_row``."""
        return BoundStep(self._session, self.vocabulary_size, cache, first_row, batch, new_tokens, logits_count)


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
        vocabulary_size: int,
        cache: KeyValueCache,
        first_row: int,
        batch: int,
        new_tokens: int,
        logits_count: int,
    ) -> None:
        self._session = session
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
        """Run the graph: the cache is updated in place; returns ``logits`` (the reused array)."""
        self._session.run_with_iobinding(self._binding)
        return self.logits
