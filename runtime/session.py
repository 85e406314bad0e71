"""One ONNX Runtime session over an exported graph, and steps bound to a cache.

A :class:`BoundStep` owns the small input tensors and the logits of one shape and holds addresses in the cache, for past
and present alike: running it again copies nothing but what the caller writes into those inputs and, from a device, the
logits.

On a GPU a step of single tokens is captured as a CUDA graph where the backend says so. ONNX Runtime does that in the
first run of a ``gpu_graph_id``, which it repeats until the graph is captured: a step may be repeated, since it writes
the same keys and values to the same places. The inputs keep their addresses, so that the next runs replay the graph, in
later calls too (:mod:`qwenforge.runtime.cache_pool`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenforge import names
from qwenforge.errors import BundleError, UserError
from qwenforge.runtime import huge_pages, mapped_files
from qwenforge.runtime.backends import Backend, cpu_backend
from qwenforge.runtime.cache_pool import CachePool
from qwenforge.runtime.kv_cache import CacheTensor, KeyValueCache
from qwenforge.runtime.memory import CPU, CacheBuffer, StepTensor

_STEP_INPUTS = (names.INPUT_IDS, names.POSITION_IDS, names.CACHE_POSITION, names.LOGITS_INDEX)
_FATAL = 4
_SIGNATURE = {
    names.INPUT_IDS: ("tensor(int64)", 2),
    names.POSITION_IDS: ("tensor(int64)", 2),
    names.CACHE_POSITION: ("tensor(int64)", 1),
    names.LOGITS_INDEX: ("tensor(int64)", 2),
    names.LOGITS: ("tensor(float)", 3),
}
_ELEMENT_TYPES = {"float32": 1, "int8": 3, "float16": 10, "bfloat16": 16, "int64": 7}
"""TensorProto.DataType by NumPy's name: NumPy has no type of its own for bfloat16."""
_EIGHT_BIT_CACHES = {"tensor(int8)", "tensor(uint8)", "tensor(float8e4m3fn)"}
_NO_CAPTURE = -1


def _cache_dtype(kind: str) -> np.dtype[np.generic]:
    import ml_dtypes

    known: dict[str, type[np.generic]] = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(bfloat16)": ml_dtypes.bfloat16,
        "tensor(int8)": np.int8,
    }
    dtype: np.dtype[np.generic] = np.dtype(known[kind])
    return dtype


class GraphSession:
    """An exported model in ONNX Runtime.

    Args:
        model_path: the ONNX model, with the inputs and outputs of :mod:`qwenforge.names`.
        threads: intra-op threads; None lets ONNX Runtime choose (one a physical core).
        session_options: ONNX Runtime session configuration entries, such as ``session.disable_prepacking``.
        vocabulary_size: V, which the graph may leave symbolic.
        backend: what runs it; the CPU unless told otherwise.
        prefill: the same model over the same caches, faster for many tokens at once.
        prefill_tokens: tokens of a step, all rows together, from which on ``prefill`` runs it.

    Raises:
        BundleError: the model cannot be loaded, or its signature is not the one of :mod:`qwenforge.names`, or it has
            another vocabulary, or ``prefill`` has other caches.
        UserError: ``threads`` is less than 1.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        threads: int | None = None,
        session_options: Mapping[str, str] | None = None,
        vocabulary_size: int | None = None,
        backend: Backend | None = None,
        prefill: GraphSession | None = None,
        prefill_tokens: int = 1,
    ) -> None:
        import onnxruntime

        if threads is not None and threads < 1:
            raise UserError(f"threads is {threads}: give at least 1, or leave it out for one a physical core")
        self.model_path = Path(model_path)
        self.backend = backend or cpu_backend()
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL  # what is wrong with a model is raised, and need not be logged beside it
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            for key, value in (self.backend.session_options | dict(session_options or {})).items():
                options.add_session_config_entry(key, value)
            if self.backend.library is not None:
                options.register_custom_ops_library(str(self.backend.library))
            with huge_pages.collapsing_new_memory():
                self._session = onnxruntime.InferenceSession(
                    str(self.model_path), options, providers=self.backend.providers
                )
            if self.backend.packs_weights:
                mapped_files.give_back(self.model_path.parent)
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
        if prefill is not None and (prefill.cache_tensors, prefill.cache_dtype) != (
            self.cache_tensors,
            self.cache_dtype,
        ):
            raise BundleError(f"{prefill.model_path}: its caches are not those of {self.model_path}; export it again")
        self._prefill, self._prefill_tokens = prefill, prefill_tokens
        self._graph_ids = itertools.count(1)
        # ONNX Runtime: no two runs at once of a session that captures.
        self._one_at_a_time = threading.Lock() if self.backend.captures_decode else None
        self._pool = CachePool[BoundStep](self._allocate_cache) if self.backend.captures_decode else None

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
    ) -> tuple[tuple[CacheTensor, ...], np.dtype[np.generic]]:
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
        if len(types) != 1 or not types <= set(self.backend.cache_types):
            runs = " or ".join(kind.removeprefix("tensor(").removesuffix(")") for kind in self.backend.cache_types)
            eight_bits = types & _EIGHT_BIT_CACHES
            advice = "without --cache" if eight_bits else f"with --dtype {self.backend.other_dtype}"
            raise BundleError(
                f"{self.model_path}: the cache is {', '.join(sorted(types))}, {self.backend.name} runs {runs}; export "
                f"{advice}"
            )
        return tuple(tensors), _cache_dtype(types.pop())

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
        """A cache of ``batch`` rows of ``capacity`` tokens, or more where one is kept for captured steps.

        It is zero-filled, or holds what an earlier call left, which no token of this one sees.
        """
        return self._pool.take(batch, capacity) if self._pool is not None else self._allocate_cache(batch, capacity)

    def release_cache(self, cache: KeyValueCache) -> None:
        """The caller is done with ``cache``, which came from :meth:`new_cache`."""
        if self._pool is not None:
            self._pool.give_back(cache)

    def _allocate_cache(self, batch: int, capacity: int) -> KeyValueCache:
        return KeyValueCache(
            self.cache_tensors, batch=batch, capacity=capacity, dtype=self.cache_dtype, memory=self.backend.memory
        )

    def bind(
        self, cache: KeyValueCache, *, first_row: int, batch: int, new_tokens: int, logits_count: int
    ) -> BoundStep:
        """A step of ``new_tokens`` tokens for ``batch`` rows of ``cache`` that begin at ``first_row``.

        The prefill graph is for prompts, of which one token's logits are asked for. A text that is scored, all of whose
        logits are, is scored by the graph that generates.
        """
        if self._prefill is not None and logits_count == 1 and batch * new_tokens >= self._prefill_tokens:
            return self._prefill.bind(
                cache, first_row=first_row, batch=batch, new_tokens=new_tokens, logits_count=logits_count
            )
        shape = (first_row, batch, new_tokens, logits_count)
        if self._pool is not None and self._pool.keeps(cache) and shape == (0, batch, 1, 1):
            return self._pool.step(batch, lambda: BoundStep(self, cache, *shape, next(self._graph_ids)))
        return BoundStep(self, cache, *shape, _NO_CAPTURE)

    def input_tensor(self, name: str, shape: tuple[int, ...]) -> StepTensor:
        """A tensor for the int64 input ``name``, in the memory from which the graph reads it.

        Numbers that only the host needs, as cache_position is for some graphs, would be copied back from a device.
        """
        places = dict(zip((each.name for each in self._session.get_inputs()), self._memory_of_inputs(), strict=True))
        memory = self.backend.host if places[name] == CPU else self.backend.memory
        return memory.step_tensor(shape, np.dtype(np.int64))

    def _memory_of_inputs(self) -> list[str]:
        return [str(info.name).lower() for info in self._session.get_input_memory_infos()]

    def release_graph(self, graph_id: int) -> None:
        """Let go of what was captured under ``graph_id``, where ONNX Runtime can."""
        if graph_id != _NO_CAPTURE:
            self._session.release_captured_graph(graph_id)

    def run(self, binding: Any, graph_id: int) -> None:
        """Run the graph on what is bound.

        Raises:
            BundleError: the graph fails, as one whose shapes are not what its signature says does.
        """
        try:
            if self._one_at_a_time is None:
                self._session.run_with_iobinding(binding, None)
            else:
                with self._one_at_a_time:
                    self._session.run_with_iobinding(binding, _options_of(graph_id))
        # As when loading: no common base below Exception.
        except Exception as error:
            raise BundleError(
                f"{self.model_path}: ONNX Runtime cannot run the model: {_first_line(error)}; export the bundle again"
            ) from error

    def io_binding(self) -> Any:
        """A new, empty binding of the session."""
        return self._session.io_binding()


class BoundStep:
    """Tensors of one step shape, bound once; write the inputs, call :meth:`run`, read ``logits``.

    Attributes:
        input_ids: [B, S] int64.
        position_ids: [B, S] int64.
        cache_position: [B] int64.
        logits_index: [B, N] int64.
        logits: [B, N, V] fp32, overwritten by every run.
        next_logits: of each row those of its last token, [V], parts of ``logits``.
    """

    def __init__(
        self,
        session: GraphSession,
        cache: KeyValueCache,
        first_row: int,
        batch: int,
        new_tokens: int,
        logits_count: int,
        graph_id: int,
    ) -> None:
        self._session = session
        self._cache = cache
        self._graph_id = graph_id
        self._last = 0
        tokens, count = (batch, new_tokens), (batch, logits_count)
        shapes = dict(zip(_STEP_INPUTS, (tokens, tokens, (batch,), count), strict=True))
        self._inputs = {name: session.input_tensor(name, shape) for name, shape in shapes.items()}
        self._logits = session.backend.memory.step_tensor((*count, session.vocabulary_size), np.dtype(np.float32))
        arrays = (self._inputs[name].array for name in _STEP_INPUTS)
        self.input_ids, self.position_ids, self.cache_position, self.logits_index = arrays
        self.logits: NDArray[np.float32] = self._logits.array
        self.next_logits = [self.logits[row, -1] for row in range(batch)]
        # Between two steps NumPy's code has left the caches: a few numbers are sooner written without it.
        self._tokens = _numbers(self.input_ids)
        self._positions = (_numbers(self.cache_position), _numbers(self.position_ids))
        self._binding = session.io_binding()
        for name, tensor in self._inputs.items():
            self._bind(self._binding.bind_input, name, tensor, "int64", shapes[name], tensor.address)
        for cached in cache.tensors:
            rows = cache.rows(cached, first_row, batch)
            place = (rows.buffer, cache.dtype.name, rows.shape, rows.address)
            self._bind(self._binding.bind_input, cached.past_name, *place)
            self._bind(self._binding.bind_output, cached.present_name, *place)
        self._bind(
            self._binding.bind_output, names.LOGITS, self._logits, "float32", self.logits.shape, self._logits.address
        )

    @staticmethod
    def _bind(
        bind: Any, name: str, where: StepTensor | CacheBuffer, dtype: str, shape: tuple[int, ...], address: int
    ) -> None:
        bind(name, where.device, where.device_index, _ELEMENT_TYPES[dtype], list(shape), address)

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
        self._last = last

    def advance_by_one(self) -> None:
        """Move the positions of a step of single tokens on by one, which costs less than setting them.

        Raises:
            ValueError: a row's new token would be written behind the cache's end.
        """
        self._last += 1
        if self._last > self._cache.capacity:
            raise ValueError(f"a step to position {self._last} overruns a cache of {self._cache.capacity} tokens")
        for positions in self._positions:
            for row in range(len(positions)):
                positions[row] += 1

    def take(self, tokens: Sequence[int]) -> None:
        """Set ``input_ids`` of a step of single tokens, a token a row."""
        for row, token in enumerate(tokens):
            self._tokens[row] = token

    def run(self) -> NDArray[np.float32]:
        """Run the graph: the cache is updated in place; returns ``logits`` (the reused array).

        Raises:
            BundleError: the graph fails, as one whose shapes are not what its signature says does.
        """
        for tensor in self._inputs.values():
            tensor.upload()
        self._session.run(self._binding, self._graph_id)
        self._logits.download()
        return self.logits

    def close(self) -> None:
        """Let go of what was captured; the step cannot be run again."""
        self._session.release_graph(self._graph_id)
        self._graph_id = _NO_CAPTURE


def _options_of(graph_id: int) -> Any:
    """Options of a run that captures or replays ``graph_id``."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options


def _numbers(array: NDArray[np.int64]) -> memoryview[int]:
    """The elements of a contiguous array, to be read and written one by one."""
    flat: Any = array.reshape(-1)
    return memoryview(flat)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:400] if text else type(error).__name__
