from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qwenforge.errors import BundleError, UnsupportedError, UserError
from qwenforge.runtime import LanguageModel, load
from qwenforge.runtime.kv_cache import rounded_capacity
from qwenforge.runtime.session import BoundStep, GraphSession
from support.bundle_builder import write_bundle
from support.ort_models import write_qwen2_bundle

ATOL = 1e-4
"""fp32 logits of magnitude 6 over 2 layers: 1e-5 is seen."""


def _addresses(step: BoundStep) -> dict[str, int]:
    """The pointers of every output that a step is bound to, cache and logits, by number."""
    outputs = step._binding.get_outputs()
    return {str(i): output.data_ptr() for i, output in enumerate(outputs)}


def test_steps_write_cache_in_place_at_constant_addresses(model: LanguageModel, reference: Any) -> None:
    import torch

    tokens = np.random.default_rng(1).integers(0, 256, (2, 20))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    session = model.session
    cache = session.new_cache(2, 20)
    addresses = {name: buffer.ctypes.data for name, buffer in cache.buffers.items()}
    prompt = session.bind(cache, first_row=0, batch=2, new_tokens=6, logits_count=2)
    prompt.input_ids[:] = tokens[:, :6]
    prompt.logits_index[:] = [[0, 5], [3, 1]]
    prompt.advance_positions(np.zeros(2, np.int64))
    np.testing.assert_allclose(prompt.run(), [expected[0, [0, 5]], expected[1, [3, 1]]], rtol=0, atol=ATOL)

    step = session.bind(cache, first_row=0, batch=2, new_tokens=1, logits_count=1)
    bound = _addresses(step)
    assert set(addresses.values()) <= set(bound.values())
    logits = step.logits.ctypes.data
    for position in range(6, 20):
        before = {name: buffer.copy() for name, buffer in cache.buffers.items()}
        step.input_ids[:, 0] = tokens[:, position]
        step.advance_positions(np.full(2, position))
        result = step.run()
        np.testing.assert_allclose(result[:, 0], expected[:, position], rtol=0, atol=ATOL)
        assert result.ctypes.data == logits and _addresses(step) == bound
        for name, buffer in cache.buffers.items():
            assert buffer.ctypes.data == addresses[name]
            changed = np.flatnonzero((buffer != before[name]).any(axis=(0, 1, 3)))
            assert changed.tolist() == [position]


def test_step_on_some_rows_leaves_the_others(model: LanguageModel) -> None:
    cache = model.session.new_cache(3, 8)
    step = model.session.bind(cache, first_row=1, batch=1, new_tokens=4, logits_count=1)
    step.input_ids[:] = 7
    step.advance_positions(np.zeros(1, np.int64))
    step.run()
    for buffer in cache.buffers.values():
        assert not buffer[[0, 2]].any() and buffer[1, :, :4].any() and not buffer[1, :, 4:].any()


def test_step_refuses_to_overrun_the_cache(model: LanguageModel) -> None:
    step = model.session.bind(model.session.new_cache(2, 8), first_row=0, batch=2, new_tokens=4, logits_count=1)
    step.advance_positions(np.array([0, 4]))
    with pytest.raises(ValueError, match="a step to position 9 overruns a cache of 8 tokens"):
        step.advance_positions(np.array([0, 5]))


def test_cache_refuses_rows_it_does_not_have(model: LanguageModel) -> None:
    with pytest.raises(IndexError, match="rows 1 to 3 of a cache of 2 rows"):
        model.session.bind(model.session.new_cache(2, 8), first_row=1, batch=2, new_tokens=1, logits_count=1)


@pytest.mark.parametrize(
    ("needed", "limit", "capacity"), [(1, 256, 64), (64, 256, 64), (65, 256, 128), (250, 255, 255)]
)
def test_capacity_is_rounded_up_within_limit(needed: int, limit: int, capacity: int) -> None:
    assert rounded_capacity(needed, limit) == capacity


@pytest.mark.parametrize("chunk", [512, 9])
def test_logits_and_score_equal_transformers(model: LanguageModel, reference: Any, chunk: int) -> None:
    import torch

    model.prefill_chunk = chunk
    lists = [np.random.default_rng(2).integers(0, 256, size).tolist() for size in (30, 1, 256)]
    for tokens, logits in zip(lists, model.logits(lists), strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([tokens])).logits[0]
        np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=ATOL)
        log_probabilities = expected.double().log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        np.testing.assert_allclose(model.score(tokens), log_probabilities.numpy(), rtol=0, atol=ATOL)


def test_logits_pieces_are_bounded(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenforge.runtime.scoring.LOGITS_BYTES", 4 * 320 * 5)
    assert [(start, len(piece)) for start, piece in model.iterate_logits([1] * 12)] == [(0, 5), (5, 5), (10, 2)]


def test_score_refuses_text_longer_than_capacity(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="the text has 257 tokens, at most 256 fit"):
        model.score([1] * 257)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"max_length": 257}, "max_length is 257, above the bundle's limit of 256"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
    ],
)
def test_load_refuses_argument_out_of_range(bundle: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(bundle, **options)


def test_load_refuses_target_of_another_runtime(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="target is tensorrt, this runtime runs ort-cpu, portable, ort-cuda"):
        load(write_bundle(tmp_path / "bundle", target="tensorrt"))


def test_load_refuses_model_that_is_not_onnx(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx: ONNX Runtime cannot load the model"):
        load(write_bundle(tmp_path / "bundle"))


def test_load_applies_session_options(checkpoint: Path, tmp_path: Path, model: LanguageModel) -> None:
    options = {"session.disable_prepacking": "1"}
    other = load(write_qwen2_bundle(checkpoint, tmp_path / "bundle", session_options=options), threads=1)
    entry = other.session._session.get_session_options().get_session_config_entry("session.disable_prepacking")
    assert entry == "1"
    assert other.generate([1, 2, 3], max_new_tokens=8) == model.generate([1, 2, 3], max_new_tokens=8)


def test_session_refuses_graph_with_other_names(bundle: Path, tmp_path: Path) -> None:
    graph = onnx.load(bundle / "model.onnx")
    for find, name in (("position_ids", "positions"), ("past_key_values.1.value", "past.1")):
        changed = onnx.ModelProto()
        changed.CopyFrom(graph)
        for value in changed.graph.input:
            value.name = name if value.name == find else value.name
        for node in changed.graph.node:
            for i, used in enumerate(node.input):
                node.input[i] = name if used == find else used
        onnx.save(changed, tmp_path / "changed.onnx")
        with pytest.raises(BundleError, match=f"the graph lacks {find}"):
            GraphSession(tmp_path / "changed.onnx")
