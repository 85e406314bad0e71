"""Templates copied to full depth: structure, names, and above all whose weights each layer carries."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenforge import names
from qwenforge.exporter import weights
from qwenforge.exporter.checkpoint import Checkpoint, CheckpointTensor
from qwenforge.exporter.instantiate import instantiate
from qwenforge.exporter.trace import trace
from qwenforge.graph_passes.pipeline import optimize
from support.cached_decoder import CachedDecoder, random_tokens, reference_logits
from support.checkpoints import make_checkpoint
from support.exported_models import DENSE, MIXED, SPARSE, exported, in_memory
from support.tolerances import FLOAT32_MODEL

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _layer(name: str | None) -> str | None:
    found = LAYER.match(name or "")
    return found[1] if found else None


def _sources(value: ir.Value) -> Iterable[str]:
    assert value.const_value is not None
    return (leaf.checkpoint_name for leaf in weights.leaves(value.const_value) if isinstance(leaf, CheckpointTensor))


SMALL = {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56, "num_hidden_layers": 3}
"""Projections so small that a constant folder would take them for constants."""


@pytest.mark.parametrize(
    ("kind", "config"), [("qwen2", DENSE), ("qwen2", SMALL), ("qwen2_moe", MIXED), ("qwen2_moe", SPARSE)]
)
def test_every_layer_reads_its_own_tensors_and_no_others(kind: Any, config: dict[str, Any]) -> None:
    source = exported(kind, **config)
    read: Counter[str] = Counter()
    for node in source.portable().graph:
        for value in node.inputs:
            if value is None or value.const_value is None:
                continue
            for name in set(_sources(value)):
                assert _layer(name) == _layer(node.name), f"{node.name} reads {name}"
                read[name] += 1
    tied = "model.embed_tokens.weight"
    assert set(read) == set(source.checkpoint.names)
    assert {name for name, times in read.items() if times > 1} == ({tied} if "tie_word_embeddings" in config else set())


@pytest.mark.parametrize("layer", [0, 2, 4, 5])
def test_derived_weights_of_a_layer_are_computed_from_that_layer(layer: int) -> None:
    source = exported("qwen2_moe", **MIXED)
    state = {name: tensor.numpy() for name, tensor in source.reference().state_dict().items()}
    scope = f"model.layers.{layer}."
    held = source.portable().graph.initializers
    assert np.array_equal(_value(held, f"{scope}self_attn.k_proj.bias"), state[f"{scope}self_attn.k_proj.bias"])
    expected = state[f"{scope}self_attn.k_proj.weight"].T
    assert np.array_equal(_value(held, f"{scope}self_attn.k_proj.weight.transposed"), expected)
    shared = "mlp.shared_expert." if layer == 5 else "mlp."
    pair = [state[f"{scope}{shared}{part}_proj.weight"] for part in ("gate", "up")]
    assert np.array_equal(_value(held, f"{scope}{shared}gate_up_proj.weight"), np.concatenate(pair).T)
    if layer == 5:
        for part in ("gate_up", "down"):
            name = f"{scope}mlp.experts.{part}_proj"
            assert np.array_equal(_value(held, name), state[name])


def _value(held: Any, name: str) -> Any:
    tensor = held[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize(("kind", "config"), [("qwen2", DENSE), ("qwen2_moe", MIXED)])
def test_model_of_two_kinds_of_layers_answers_as_transformers(kind: Any, config: dict[str, Any]) -> None:
    source = exported(kind, **config)
    tokens = random_tokens(16)
    decoder = CachedDecoder(in_memory(source.portable()), capacity=16)
    parts = [tokens[:7], tokens[7:13], *([token] for token in tokens[13:])]
    found = np.concatenate([decoder.step([part])[0] for part in parts])
    assert np.abs(found - reference_logits(source.reference(), tokens)).max() < FLOAT32_MODEL


def test_inputs_and_outputs_are_the_documented_ones_in_layer_order() -> None:
    graph = exported("qwen2", **DENSE).portable().graph
    tokens = [names.INPUT_IDS, names.POSITION_IDS, names.CACHE_POSITION, names.LOGITS_INDEX]
    layers = range(6)
    past = [name(layer) for layer in layers for name in (names.past_key, names.past_value)]
    present = [name(layer) for layer in layers for name in (names.present_key, names.present_value)]
    assert [value.name for value in graph.inputs] == [*tokens, *past]
    assert [value.name for value in graph.outputs] == [names.LOGITS, *present]
    for value in (*graph.inputs[4:], *graph.outputs[1:]):
        assert value.dtype == ir.DataType.FLOAT and str(value.shape) == "[batch,2,capacity,16]"
    assert str(graph.outputs[0].shape) == "[batch,logits_count,320]"


def test_layers_of_one_kind_are_equal_but_for_their_names() -> None:
    model = exported("qwen2_moe", **MIXED).portable()
    ops: dict[str | None, list[str]] = {}
    for node in model.graph:
        ops.setdefault(_layer(node.name), []).append(node.op_type)
    assert ops["0"] == ops["1"] == ops["2"] == ops["4"] != ops["3"] == ops["5"]
    attention = [node for node in model.graph if node.op_type == "GroupedQueryAttention"]
    assert [node.name for node in attention] == [f"model.layers.{layer}.self_attn.attention" for layer in range(6)]
    shared = {(node.inputs[5], node.inputs[6], node.inputs[7]) for node in attention}
    assert len(shared) == 1, "rotary tables and positions are there once"


def test_shape_arithmetic_is_there_once_and_belongs_to_no_layer() -> None:
    for config in (MIXED, SPARSE):
        graph = exported("qwen2_moe", **config).portable().graph
        shapes = [node.name for node in graph if node.op_type in ("Shape", "Concat")]
        assert 0 < len(shapes) <= 3 and not any(map(_layer, shapes))


def test_each_layer_keeps_its_kinds_window() -> None:
    model = exported("qwen2", **DENSE).portable()
    attention = [node for node in model.graph if node.op_type == "GroupedQueryAttention"]
    assert [node.attributes["sliding_window"].as_int() for node in attention] == [0, 0, 0, 5, 5, 5]


@pytest.mark.parametrize(("kind", "config"), [("qwen2", DENSE), ("qwen2_moe", MIXED)])
def test_names_are_unique_and_the_graph_is_valid(kind: Any, config: dict[str, Any]) -> None:
    model = in_memory(exported(kind, **config).portable())
    nodes = [node.name for node in model.graph]
    values = [value.name for node in model.graph for value in node.outputs]
    assert len(set(nodes)) == len(nodes) and len(set(values)) == len(values)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_template_can_be_copied_again_and_is_not_changed() -> None:
    source = exported("qwen2_moe", **MIXED)
    before = str(source.fused.graph)
    first, second = source.portable(), source.portable()
    assert str(source.fused.graph) == before
    assert str(first.graph) == str(second.graph) and first.graph[0] is not second.graph[0]


def test_template_without_its_norm_is_an_internal_error() -> None:
    source = exported("qwen2_moe", **SPARSE)
    broken = source.fused.clone()
    broken.graph.initializers["model.norm.weight"].name = "another.weight"
    with pytest.raises(RuntimeError, match=r"no RMSNormalization by model\.norm\.weight"):
        instantiate(broken, source.traced, source.checkpoint)


def test_weights_equal_in_the_traced_layer_stay_apart(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2", tokenizer=False)
    file = folder / "model.safetensors"
    state = load_file(file)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        state[f"model.layers.0.{norm}.weight"] = torch.ones_like(state["model.norm.weight"])
    save_file(state, file, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    traced = trace(checkpoint, ir.DataType.FLOAT)
    model = instantiate(optimize(traced.model, positions=256).model, traced, checkpoint)
    norm = model.graph.initializers["model.layers.1.post_attention_layernorm.weight"]
    assert set(_sources(norm)) == {"model.layers.1.post_attention_layernorm.weight"}
