"""The path of a GPU, with the CPU in its place: buffers apart from Python's arrays, copied where the code says so."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwenforge import names
from qwenforge.runtime import LanguageModel, load
from qwenforge.runtime import language_model as module
from qwenforge.runtime.backends import CPU_PROVIDER, Backend
from qwenforge.runtime.memory import CPU, CUDA, DeviceMemory, HostMemory
from qwenforge.runtime.session import GraphSession

HOST_INPUTS = [(), (names.CACHE_POSITION,)]
"""Inputs that the graph reads in host memory: none where our op attends, the lengths with GroupQueryAttention."""


class _Recorded:
    """A session that notes the graph id of each run, and what is released; everything else goes through."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self._ids: list[int] = []
        self.released: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def graph_ids(self) -> list[int]:
        return list(self._ids)

    def clear(self) -> None:
        self._ids.clear()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self._ids.append(int(options.get_run_config_entry("gpu_graph_id")))
        self.session.run_with_iobinding(binding, options)

    def release_captured_graph(self, graph_id: int) -> None:
        self.released.append(graph_id)


def standin_backend(*, captures: bool = False, library: Path | None = None) -> Backend:
    """The GPU's backend but for the device: the same memory class, on the CPU."""
    return Backend(
        name="the stand-in for a GPU",
        providers=[CPU_PROVIDER],
        memory=DeviceMemory(CPU, 0, [CPU_PROVIDER]),
        cache_types=("tensor(float)", "tensor(float16)"),
        other_dtype="bf16",
        library=library,
        captures_decode=captures,
    )


@pytest.fixture
def load_on_device(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LanguageModel]:
    def load_it(host_inputs: tuple[str, ...] = (), **options: bool) -> LanguageModel:
        def memory_of_inputs(self: GraphSession) -> list[str]:
            return [CPU if value.name in host_inputs else CUDA for value in self._session.get_inputs()]

        monkeypatch.setattr(GraphSession, "_memory_of_inputs", memory_of_inputs)
        monkeypatch.setattr(module, "_backend", lambda *_: standin_backend(**options))
        return load(bundle, threads=2)

    return load_it


@pytest.mark.parametrize("host_inputs", HOST_INPUTS, ids=["all on the device", "lengths on the host"])
def test_batch_of_unequal_lengths_equals_the_host(
    model: LanguageModel, load_on_device: Callable[..., LanguageModel], host_inputs: tuple[str, ...]
) -> None:
    """Six rows, two of each prompt (rows are copied), some ended early (rows move up), one longer than a chunk."""
    other = load_on_device(host_inputs)
    prompts = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in (3, 40, 9)]
    for each in (model, other):
        each.prefill_chunk = 16
    expected = model.generate(prompts, max_new_tokens=10, n=2, temperature=0.8, seed=3)
    assert other.generate(prompts, max_new_tokens=10, n=2, temperature=0.8, seed=3) == expected
    ends = expected.sequences[0].tokens[4]
    model.end_tokens = other.end_tokens = frozenset({ends})
    shorter = model.generate(prompts, max_new_tokens=10)
    assert other.generate(prompts, max_new_tokens=10) == shorter


def test_logits_of_a_text_in_chunks_equal_the_host(
    model: LanguageModel, load_on_device: Callable[..., LanguageModel]
) -> None:
    other = load_on_device()
    tokens = np.random.default_rng(2).integers(0, 256, 50).tolist()
    model.prefill_chunk = other.prefill_chunk = 7
    assert np.array_equal(model.logits([tokens])[0], other.logits([tokens])[0])


def test_caches_are_bound_in_place_and_nothing_else_moves(load_on_device: Callable[..., LanguageModel]) -> None:
    session = load_on_device().session
    cache = session.new_cache(2, 16)
    assert all(not buffer.any() for buffer in cache.buffers.values())
    step = session.bind(cache, first_row=1, batch=1, new_tokens=3, logits_count=1)
    places = {tensor.past_name: cache.rows(tensor, 1, 1) for tensor in cache.tensors}
    bound = {output.data_ptr() for output in step._binding.get_outputs()}
    assert {rows.address for rows in places.values()} <= bound
    assert all(rows.address == rows.buffer.address + rows.buffer.row_bytes for rows in places.values())
    step.input_ids[:] = 7
    step.advance_positions(np.zeros(1, np.int64))
    step.run()
    for buffer in cache.buffers.values():
        assert not buffer[0].any() and buffer[1, :, :3].any() and not buffer[1, :, 3:].any()
    cache.copy_row(1, 0, 3)
    for buffer in cache.buffers.values():
        assert np.array_equal(buffer[0], buffer[1])


def _recorded(model: LanguageModel) -> _Recorded:
    recorded = _Recorded(model.session._session)
    model.session._session = recorded
    return recorded


def test_decode_steps_are_captured_and_prompts_are_not(load_on_device: Callable[..., LanguageModel]) -> None:
    """One graph for each batch size, which later calls use again."""
    model = load_on_device(captures=True)
    recorded = _recorded(model)
    prompts = [[1, 2, 3], [4, 5]]
    first = model.generate(prompts, max_new_tokens=4, ignore_eos=True)
    assert recorded.graph_ids() == [-1, 1, 1, 1]
    recorded.clear()
    model.end_tokens = frozenset({first.sequences[0].tokens[1]})
    shorter = model.generate(prompts, max_new_tokens=4)
    ends = [len(sequence.tokens) for sequence in shorter.sequences]
    assert ends[0] == 2 and recorded.graph_ids()[0] == -1
    assert set(recorded.graph_ids()) == ({-1, 1, 2} if ends[1] > 2 else {-1, 1})
    recorded.clear()
    assert model.generate(prompts, max_new_tokens=4, ignore_eos=True) == first
    assert recorded.graph_ids() == [-1, 1, 1, 1] and recorded.released == []


def test_kept_cache_grows_with_what_is_asked_for(
    model: LanguageModel, load_on_device: Callable[..., LanguageModel]
) -> None:
    """Each call answers as on the host, whatever the cache holds from the call before."""
    other = load_on_device(captures=True)
    recorded = _recorded(other)
    prompts = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in (9, 70, 5, 3)]
    for batch, ids in ((prompts[:1], {-1, 1}), (prompts[:2], {-1, 2}), (prompts[2:], {-1, 2}), (prompts[3:], {-1, 3})):
        expected = model.generate(batch, max_new_tokens=6, ignore_eos=True)
        recorded.clear()
        assert other.generate(batch, max_new_tokens=6, ignore_eos=True) == expected
        assert set(recorded.graph_ids()) == ids
    assert recorded.released == [1]
    kept = other.session.new_cache(1, 64)
    assert (kept.batch, kept.capacity) == (2, 128)


def test_calls_at_the_same_time_have_caches_of_their_own(load_on_device: Callable[..., LanguageModel]) -> None:
    model = load_on_device(captures=True)
    recorded = _recorded(model)
    alone = [[event.token for event in model.stream([prompt], max_new_tokens=5)] for prompt in ([1, 2], [7, 8, 9])]
    recorded.clear()
    streams = [model.stream([prompt], max_new_tokens=5) for prompt in ([1, 2], [7, 8, 9])]
    both = [[event.token for event in pair] for pair in zip(*streams, strict=True)]
    assert [list(tokens) for tokens in zip(*both, strict=True)] == alone
    assert recorded.graph_ids().count(1) == 4, "the other's steps are not captured"


def test_abandoned_stream_gives_its_cache_back(load_on_device: Callable[..., LanguageModel]) -> None:
    model = load_on_device(captures=True)
    stream = model.stream([[1, 2, 3]], max_new_tokens=8, ignore_eos=True)
    for _ in range(3):
        next(stream)
    kept = model.session._pool
    assert kept is not None and kept._in_use
    stream.close()  # type: ignore[attr-defined]
    assert not kept._in_use


def _write(buffer: Any, values: np.ndarray[Any, Any]) -> None:
    """As a session does, by the address that it is bound to."""
    data = np.ascontiguousarray(values)
    ctypes.memmove(buffer.address, data.ctypes.data, data.nbytes)


@pytest.mark.parametrize("memory", [HostMemory(), DeviceMemory(CPU, 0, [CPU_PROVIDER])], ids=["host", "device"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_of_a_cache_are_copied_whole(memory: Any, dtype: Any) -> None:
    (buffer,) = memory.cache_buffers([(3, 2, 5, 4)], np.dtype(dtype))
    assert buffer.row_bytes == 2 * 5 * 4 * np.dtype(dtype).itemsize
    before = buffer.read()
    assert before.shape == (3, 2, 5, 4) and before.dtype == dtype and not before.any()
    _write(buffer, np.arange(120).reshape(before.shape).astype(dtype))
    filled = buffer.read().copy()
    buffer.copy_row(2, 0, 5)
    after = buffer.read()
    assert filled.any() and np.array_equal(after[[0, 2]], filled[[2, 2]]) and np.array_equal(after[1], filled[1])


def test_step_tensor_on_a_device_is_apart_until_it_is_copied() -> None:
    tensor = DeviceMemory(CPU, 0, [CPU_PROVIDER]).step_tensor((2, 3), np.dtype(np.int64))
    assert tensor.address != tensor.array.ctypes.data
    assert not tensor.array.any()
    tensor.array[:] = 5
    tensor.upload()
    tensor.array[:] = 6
    tensor.download()
    assert (tensor.array == 5).all()
