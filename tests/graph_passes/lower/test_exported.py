"""Real exports, lowered: how many nodes they have, and that they answer as the portable form and as transformers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.engine.verification import tolerance
from qwenforge.exporter import weights
from qwenforge.graph_passes.lower import lower
from support.cached_decoder import CachedDecoder, random_tokens, reference_logits
from support.checkpoints import Kind
from support.exported_models import DENSE, MIXED, SPARSE, exported, in_memory
from support.small_graphs import relative_error
from support.tolerances import FLOAT32_MODEL

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LAYER = re.compile(r"model\.layers\.(\d+)\.")
CHOICE = 3
"""Nodes that a last layer with experts adds outside the layers, whose choice of tokens stands behind its attention: two
GatherND, of attention and of the residual, where one was; a Shape and a Concat for the shape of chosen tokens."""
QWEN3: dict[str, Any] = {"num_hidden_layers": 3, "head_dim": 24, "num_attention_heads": 6}
QWEN3_MOE: dict[str, Any] = {"num_hidden_layers": 3, "head_dim": 16}
EVERY_EXPERT: dict[str, Any] = {"num_hidden_layers": 3, "num_experts_per_tok": 6}
MODELS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "qwen2": ("qwen2", DENSE),
    "qwen2_moe": ("qwen2_moe", SPARSE),
    "qwen2_moe, mixed": ("qwen2_moe", MIXED),
    "qwen3": ("qwen3", QWEN3),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
}


def _lowered(name: str, how: str = "copy") -> ir.Model:
    kind, config = MODELS[name]
    return lower(exported(kind, **config).portable(), "ort-cpu", weights=how)


def _nodes_by_layer(model: ir.Model) -> tuple[list[int], int]:
    """(nodes of each layer, nodes outside the layers), by the nodes' names."""
    count = Counter(match[1] if (match := LAYER.match(node.name or "")) else "" for node in model.graph)
    outside = count.pop("")
    return [count[str(layer)] for layer in range(len(count))], outside


def test_lowered_dense_layers_are_small() -> None:
    layers, outside = _nodes_by_layer(_lowered("qwen2"))
    assert layers == [11] * 6 and outside <= 11


def test_lowered_moe_layers_are_small() -> None:
    layers, outside = _nodes_by_layer(_lowered("qwen2_moe"))
    assert layers == [19] * 3 and outside <= 13 + CHOICE


def test_lowered_layers_of_two_kinds_are_small() -> None:
    layers, outside = _nodes_by_layer(_lowered("qwen2_moe, mixed"))
    assert layers == [11, 11, 11, 19, 11, 19] and outside <= 13 + CHOICE


@pytest.mark.parametrize(("name", "limit", "most_outside"), [("qwen3", 13 + 6 + 2, 15), ("qwen3_moe", 20, 15 + CHOICE)])
def test_lowered_qwen3_layers_are_larger_by_the_norms_of_q_and_k(name: str, limit: int, most_outside: int) -> None:
    """Six nodes: two norms, two Reshapes around each; and two that rotate where the head size is no multiple of 16."""
    layers, outside = _nodes_by_layer(_lowered(name))
    assert max(layers) <= limit and outside <= most_outside


def test_lowered_half_precision_adds_one_cast_outside_the_layers() -> None:
    layers, outside = _nodes_by_layer(lower(exported("qwen2_moe", dtype=HALF, **EVERY_EXPERT).portable(), "ort-cpu"))
    assert layers == [19] * 3 and outside <= 14 + CHOICE


def test_lowered_linked_layers_have_a_product_for_each_stored_matrix() -> None:
    """Two products and two additions more for q, k and v; a product more and no Split for gate and up."""
    assert _nodes_by_layer(_lowered("qwen2", "link"))[0] == [15] * 6
    assert _nodes_by_layer(_lowered("qwen2_moe", "link"))[0] == [23] * 3


Step = Callable[[CachedDecoder], list[Any]]


def _prompts(decoder: CachedDecoder) -> list[Any]:
    """Right-padded rows from 0, then single tokens at different positions."""
    rows = [random_tokens(count, seed=count) for count in (9, 4, 1)]
    return [*decoder.step(rows, pad=5), *decoder.step([[7], [8], [9]]), *decoder.step([[1], [2], [3]])]


def _chunks(decoder: CachedDecoder) -> list[Any]:
    """One row: a prompt, a chunk against the part-filled cache, decode to the last place."""
    tokens = random_tokens(16)
    parts = [tokens[:7], tokens[7:13], *([token] for token in tokens[13:])]
    return [logits for part in parts for logits in decoder.step([part])]


@pytest.mark.parametrize(("batch", "run"), [(3, _prompts), (1, _chunks)], ids=["rows", "chunks"])
@pytest.mark.parametrize("how", ["copy", "link"])
@pytest.mark.parametrize("name", MODELS)
def test_lowered_export_answers_as_the_portable_form(name: str, how: str, batch: int, run: Step) -> None:
    kind, config = MODELS[name]
    portable = CachedDecoder(in_memory(exported(kind, **config).portable()), batch=batch, capacity=16)
    lowered = CachedDecoder(in_memory(_lowered(name, how)), batch=batch, capacity=16, disable_prepacking=how == "link")
    for found, expected in zip(run(lowered), run(portable), strict=True):
        assert np.abs(found - expected).max() < FLOAT32_MODEL


@pytest.mark.parametrize("name", MODELS)
def test_lowered_export_answers_as_transformers(name: str) -> None:
    kind, config = MODELS[name]
    tokens = random_tokens(16)
    found = np.concatenate(_chunks(CachedDecoder(in_memory(_lowered(name)), capacity=16)))
    assert np.abs(found - reference_logits(exported(kind, **config).reference(), tokens)).max() < FLOAT32_MODEL


def test_lowered_half_precision_experts_are_exact_but_for_the_choice_of_experts() -> None:
    """Every expert is chosen here, so no rounding can choose another one: what is left is rounding.

    transformers' own fp16 model is off by as much.
    """
    source = exported("qwen2_moe", dtype=HALF, **EVERY_EXPERT)
    lowered = in_memory(lower(source.portable(), "ort-cpu"))
    found = np.concatenate(_chunks(CachedDecoder(lowered, capacity=16)))
    expected = reference_logits(source.reference(), random_tokens(16))
    allowed = tolerance(HALF, routed=True)
    assert relative_error(found, expected) < allowed.bound / allowed.logit_scale


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_linked_export_computes_no_matrix(name: str) -> None:
    """Every matrix is one the checkpoint holds, once; a tied vocabulary projection is the embedding itself."""
    model = _lowered(name, "link")
    stored = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None and not isinstance(tensor, weights.DerivedTensor), f"{value.name} is computed"
        if LAYER.match(value.name or "") or (value.name or "").startswith(("model.", "lm_head")):
            stored.append(weights.plan_key(tensor))
    assert len(stored) == len(set(stored))


def test_linked_moe_export_computes_the_stacked_experts_only() -> None:
    model = _lowered("qwen2_moe", "link")
    derived = {name for name, v in model.graph.initializers.items() if isinstance(v.const_value, weights.DerivedTensor)}
    assert derived == {
        f"model.layers.{layer}.mlp.experts.{part}"
        for layer in range(3)
        for part in ("gate_up_proj.interleaved", "down_proj")
    }
