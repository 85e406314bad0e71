"""The decode and the prefill graph of a quantized model: what they share on disk, and that they are one model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.engine.ort_cpu_graphs import PREFILL_TOKENS, CpuGraphs, lower_quantized, save_graphs
from qwenforge.errors import BundleError
from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import rounded
from qwenforge.exporter.external_data import load_model
from qwenforge.graph_passes.infra import set_weight
from qwenforge.graph_passes.quantize.sites import find_sites
from qwenforge.runtime.kv_cache import KeyValueCache
from qwenforge.runtime.prefill import prefill
from qwenforge.runtime.session import GraphSession
from support.exported_models import MIXED, exported, no_weight_is_read
from support.small_graphs import Array, relative_error
from support.tolerances import INT8_ACTIVATIONS

VOCABULARY = 320


def _quantized(kind: str = "qwen2", weight_format: str = "int4") -> ir.Model:
    config = {"num_hidden_layers": 3, "tie_word_embeddings": True} if kind == "qwen2" else MIXED
    model = exported(kind, **config).portable()  # type: ignore[arg-type]
    with no_weight_is_read():
        for site in find_sites(model).linear.values():
            if site.role not in ("router", "shared_gate"):
                matrix = weights.transpose(site.weight, (1, 0))
                form = "int8" if site.role == "vocabulary" else weight_format
                found = rounded(matrix, form, 16 if form == "int4" else weights.dims(matrix)[1])  # type: ignore[arg-type]
                set_weight(model, site.node, 1, weights.transpose(found.dequantized(), (1, 0)))
    return model


def _graphs(optimize: str, kind: str = "qwen2", weight_format: str = "int4") -> CpuGraphs:
    model = _quantized(kind, weight_format)
    with no_weight_is_read():
        return lower_quantized(model, optimize)  # type: ignore[arg-type]


def _kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_latency_has_blocks_to_decode_and_integers_to_prefill() -> None:
    graphs = _graphs("latency")
    assert graphs.prefill is not None and graphs.record is not None
    assert graphs.session_options == {"session.force_spinning_stop": "1"}
    decode, many = _kinds(graphs.decode), _kinds(graphs.prefill)
    products = 5 * 3  # packed q, k and v; o; gate and up, each its own; down
    assert decode["MatMulIntegerToFloat"] == 0 and decode["MatMulNBits"] == products + 1
    assert many["MatMulIntegerToFloat"] == products and many["MatMulNBits"] == 1, "the vocabulary stays in blocks"
    assert graphs.record.minimum_tokens == PREFILL_TOKENS


def test_memory_has_one_graph() -> None:
    graphs = _graphs("memory")
    assert graphs.prefill is None and graphs.record is None and "MatMulNBits" in _kinds(graphs.decode)
    assert graphs.session_options == {}


def test_model_without_quantized_products_needs_no_second_graph() -> None:
    portable = exported("qwen2", num_hidden_layers=3, tie_word_embeddings=True).portable()
    assert lower_quantized(portable, "latency").prefill is None


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_moe"])
def test_what_both_graphs_hold_is_stored_once(kind: str, tmp_path: Path) -> None:
    saved = save_graphs(_graphs("latency", kind), tmp_path)
    assert saved.prefill is not None and saved.prefill.data is not None
    assert {file.path.name for file in saved.files} == {
        *("model.onnx", "model.onnx.data", "prefill.onnx", "prefill.onnx.data")
    }
    places: dict[str, set[str]] = {"model.onnx.data": set(), "prefill.onnx.data": set()}
    for name, value in load_model(tmp_path / "prefill.onnx").graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            places[Path(value.const_value.location).name].add(name)
    assert all(".rows" in name or ".row_scales" in name for name in places["prefill.onnx.data"])
    assert any("lm_head" in name for name in places["model.onnx.data"])


def _session(folder: Path, tokens: int | None) -> GraphSession:
    many = GraphSession(folder / "prefill.onnx", threads=2, vocabulary_size=VOCABULARY) if tokens else None
    return GraphSession(
        folder / "model.onnx", threads=2, vocabulary_size=VOCABULARY, prefill=many, prefill_tokens=tokens or 1
    )


def _prefilled(session: GraphSession, prompt: list[int]) -> tuple[Array, KeyValueCache]:
    cache = session.new_cache(1, 64)
    return prefill(session, cache, [prompt], 512)[0], cache


def test_prefill_graph_fills_the_cache_that_the_decode_graph_goes_on_with(tmp_path: Path) -> None:
    """Of one model in int8, whose answers differ by the rounding of activations alone."""
    save_graphs(_graphs("latency", weight_format="int8"), tmp_path)
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, 40).tolist()
    alone, together = _session(tmp_path, None), _session(tmp_path, 16)
    answers = []
    for session in (alone, together):
        logits, cache = _prefilled(session, prompt)
        step = session.bind(cache, first_row=0, batch=1, new_tokens=1, logits_count=1)
        step.input_ids[:] = 7
        step.advance_positions(np.array([len(prompt)]))
        answers.append(np.concatenate([logits, step.run()[0, 0]]))
    assert 0 < relative_error(answers[1], answers[0]) < 4 * INT8_ACTIVATIONS  # of three layers and the projection


def test_steps_go_to_the_graph_that_is_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_graphs(_graphs("latency"), tmp_path)
    session = _session(tmp_path, 16)
    cache = session.new_cache(2, 64)
    used = {}
    for batch, tokens, logits in ((1, 1, 1), (1, 15, 1), (1, 16, 1), (2, 8, 1), (1, 32, 32)):
        step = session.bind(cache, first_row=0, batch=batch, new_tokens=tokens, logits_count=logits)
        used[batch, tokens, logits] = step._session.model_path.name
    assert used == {
        (1, 1, 1): "model.onnx",
        (1, 15, 1): "model.onnx",
        (1, 16, 1): "prefill.onnx",
        (2, 8, 1): "prefill.onnx",
        (1, 32, 32): "model.onnx",
    }


def test_prefill_graph_of_another_model_is_refused(tmp_path: Path) -> None:
    save_graphs(_graphs("latency"), tmp_path)
    (tmp_path / "other").mkdir()
    save_graphs(_graphs("latency", "qwen2_moe"), tmp_path / "other")
    other = GraphSession(tmp_path / "other" / "prefill.onnx", threads=1)
    with pytest.raises(BundleError, match="its caches are not those of"):
        GraphSession(tmp_path / "model.onnx", threads=1, prefill=other)
