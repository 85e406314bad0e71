"""Quantized models lowered to our CPU ops: what is left in the graph, and that it answers as the others do."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import names
from qwenforge.engine.cpu_library import library_of
from qwenforge.engine.ort_cpu_graphs import lower_quantized
from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import rounded
from qwenforge.graph_passes.infra import set_weight
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.lower.cpu_ops import PROLOGUES
from qwenforge.graph_passes.quantize.sites import KEPT_BY_DEFAULT, find_sites
from support.cached_decoder import CachedDecoder, random_tokens
from support.exported_models import DENSE, MIXED, SPARSE
from support.portable_models import portable_model, random_model
from support.small_graphs import Array
from support.tolerances import FLOAT32_MODEL, INT8_ACTIVATIONS

LAYERS = 3
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"num_hidden_layers": LAYERS}),
    "tied vocabulary": ("qwen2", {"num_hidden_layers": LAYERS, "tie_word_embeddings": True}),
    "sliding window": ("qwen2", DENSE),
    "qwen2_moe": ("qwen2_moe", SPARSE),
    "experts in some layers": ("qwen2_moe", MIXED),
    "qwen3": ("qwen3", {"num_hidden_layers": LAYERS}),
    "qwen3_moe": ("qwen3_moe", {"num_hidden_layers": LAYERS}),
}
_ALLOWED = 3 * INT8_ACTIVATIONS
"""Of a whole model: half a dozen products in a row, each with rounded activations."""


def quantized(kind: str, *, weight_format: Literal["int4", "int8"] = "int4", group: int | None = 16) -> ir.Model:
    """The portable model of ``kind`` with all of its matrices quantized that are by default, the vocabulary in int8."""
    family, config = KINDS[kind]
    model = portable_model(random_model(family, **config))
    sites = find_sites(model)
    for site in sites.linear.values():
        if site.role == "vocabulary" or site.role not in KEPT_BY_DEFAULT:
            matrix = weights.transpose(site.weight, (1, 0))
            whole = site.role == "vocabulary" or group is None
            form = "int8" if site.role == "vocabulary" else weight_format
            found = rounded(matrix, form, weights.dims(matrix)[1] if whole else group)  # type: ignore[arg-type]
            set_weight(model, site.node, 1, weights.transpose(found.dequantized(), (1, 0)))
    for experts in sites.experts.values():
        for index in (2, 3):
            value = experts.node.inputs[index]
            assert value is not None and value.const_value is not None
            size = group or weights.dims(value.const_value)[2]
            set_weight(model, experts.node, index, rounded(value.const_value, weight_format, size).dequantized())
    return model


@functools.cache
def lowered(kind: str, weight_format: Literal["int4", "int8"] = "int4", group: int | None = 16) -> ir.Model:
    """To our ops."""
    model = quantized(kind, weight_format=weight_format, group=group)
    return lower(model, "ort-cpu", products="blocks", own_ops=True)


def kinds(model: ir.Model) -> Counter[str]:
    """Nodes by their op, those of other domains with it."""
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph)


def ours(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.domain == names.CPU_DOMAIN)


def others_in_layers(model: ir.Model) -> set[str]:
    """Ops of ONNX and ONNX Runtime between the first of ours and the last layer's attention.

    Behind it, the last tokens are chosen.
    """
    nodes = list(model.graph)
    places = [i for i, node in enumerate(nodes) if node.domain == names.CPU_DOMAIN]
    last = [i for i in places if nodes[i].op_type == "CachedAttention"][-1]
    return {node.op_type for node in nodes[places[0] : last] if node.domain != names.CPU_DOMAIN}


@pytest.mark.parametrize(
    ("kind", "layers", "experts"),
    [("qwen2", LAYERS, 0), ("tied vocabulary", LAYERS, 0), ("sliding window", 6, 0)]
    + [("qwen2_moe", LAYERS, LAYERS), ("experts in some layers", 6, 2)],
)
def test_layer_is_four_ops_of_ours_and_nothing_else(kind: str, layers: int, experts: int) -> None:
    model = lowered(kind)
    expected = {"CachedAttention": layers, "QuantizedLinear": 2 * layers + 1}
    expected |= {"QuantizedGatedMlp": layers - experts, "QuantizedMixtureOfExperts": experts}
    assert ours(model) == Counter({name: count for name, count in expected.items() if count})
    assert not others_in_layers(model)
    left = kinds(model)
    assert not [name for name in left if name.endswith(("MatMulNBits", "GroupQueryAttention", "QMoE", "QuickGelu"))]
    assert sum(count for name, count in left.items() if name.endswith("RMSNormalization")) <= 1


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_moe"])
def test_norms_inside_our_ops_add_the_models_epsilon(kind: str) -> None:
    """Answers would hardly tell."""
    family, config = KINDS[kind]
    model = portable_model(random_model(family, rms_norm_eps=3e-5, **config))
    for site in find_sites(model).linear.values():
        if site.role == "vocabulary" or site.role not in KEPT_BY_DEFAULT:
            found = rounded(weights.transpose(site.weight, (1, 0)), "int8", 16)
            set_weight(model, site.node, 1, weights.transpose(found.dequantized(), (1, 0)))
    with_norm = [
        node
        for node in lower(model, "ort-cpu", products="blocks", own_ops=True).graph
        if node.op_type in PROLOGUES and len(node.inputs) > PROLOGUES[node.op_type] + 1
    ]
    assert len(with_norm) >= LAYERS
    assert [node.attributes["epsilon"].as_float() for node in with_norm] == pytest.approx([3e-5] * len(with_norm))


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_heads_with_norms_stay_with_onnx_runtime(kind: str) -> None:
    """Queries and keys are not packed then: our attention takes only packed ones."""
    model = lowered(kind)
    last = "QuantizedGatedMlp" if kind == "qwen3" else "QuantizedMixtureOfExperts"
    assert ours(model) == {last: LAYERS, "QuantizedLinear": 4 * LAYERS + 1}
    left = kinds(model)
    assert left["com.microsoft::GroupQueryAttention"] == LAYERS
    assert not [name for name in left if name.endswith(("MatMulNBits", "QMoE", "QuickGelu"))]
    # Of a layer: the norm that q, k and v read, and those of the heads; the MLP has its own inside.
    assert (
        sum(count for name, count in left.items() if name.endswith(("RMSNormalization", "LayerNormalization")))
        == 3 * LAYERS
    )
    assert not [node.name for node in model.graph if node.op_type == "MatMul"]


def _answers(model: ir.Model, *, chunks_of_batch: bool) -> Array:
    """Prefill, a chunk against a part-filled cache, then single tokens; behind them a batch of unequal lengths.

    A chunk of a batch against its caches is beyond ONNX Runtime's attention.
    """
    library = library_of(model)
    decoder, tokens = CachedDecoder(model, capacity=24, library=library), random_tokens(22)
    parts = [tokens[:9], tokens[9:16], *([token] for token in tokens[16:])]
    found = [decoder.step([part])[0] for part in parts]
    batch = CachedDecoder(model, batch=3, capacity=24, library=library)
    found += batch.step([tokens[:7], tokens[3:4], tokens[5:17]])
    if chunks_of_batch:
        found += batch.step([tokens[:1], tokens[4:9], tokens[1:3]])
    found += batch.step([[5], [6], [7]])
    assert batch.untouched_from(20)
    return np.concatenate(found)


@pytest.mark.parametrize("form", ["portable", "onnxruntime"])
@pytest.mark.parametrize(
    ("kind", "weight_format", "group"),
    [*((kind, "int4", 16) for kind in KINDS), ("qwen2", "int8", None), ("qwen2_moe", "int8", None)]
    + [("qwen2_moe", "int4", 32)],
)
def test_answers_are_those_of_the_other_graphs(
    kind: str, weight_format: Literal["int4", "int8"], group: int | None, form: str
) -> None:
    model = quantized(kind, weight_format=weight_format, group=group)
    chunks = form == "portable" and not kind.startswith("qwen3")
    other = lower(model.clone(), "ort-cpu", products="blocks") if form == "onnxruntime" else model
    expected = _answers(other, chunks_of_batch=chunks)
    found = _answers(lowered(kind, weight_format, group), chunks_of_batch=chunks)
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    # Of a token that another expert takes after rounding, nothing can be said: of most tokens it can.
    if form == "portable":
        assert 0 < np.median(errors) < _ALLOWED, "of the rounding of activations, and of nothing else"
    else:
        assert np.median(errors) < FLOAT32_MODEL, "they round alike"


def test_one_graph_serves_decode_and_prefill() -> None:
    graphs = lower_quantized(quantized("qwen2"), kernels="qwenforge")
    assert graphs.prefill is None and graphs.record is None and ours(graphs.decode)
