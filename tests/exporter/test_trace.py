"""Tracing: one layer of each kind, the checkpoint's names, transformers' rotary frequencies, no weight read."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import names
from qwenforge.exporter import trace as tracing
from qwenforge.exporter import weights
from qwenforge.exporter.checkpoint import Checkpoint, CheckpointTensor
from qwenforge.exporter.trace import ATTENTION_MASK, checkpoint_name, template_config, trace
from support.checkpoints import make_checkpoint
from support.exported_models import DENSE, MIXED, SPARSE, exported, no_weight_is_read


def _computed(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The initializers that are weights: neither the exporter's own constants nor the rotary frequencies."""
    found = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None, f"{name} has no tensor"
        if any(isinstance(leaf, CheckpointTensor) for leaf in weights.leaves(value.const_value)):
            found[name] = value.const_value
    return found


def test_one_layer_of_each_kind_is_traced() -> None:
    assert exported("qwen2_moe", **SPARSE).traced.template_of_layer == (0, 0, 0)
    traced = exported("qwen2_moe", **MIXED).traced
    assert traced.template_of_layer == (0, 0, 0, 1, 0, 1)
    assert traced.representative == (0, 3)
    traced = exported("qwen2", **DENSE).traced
    assert traced.template_of_layer == (0, 0, 0, 1, 1, 1)
    assert traced.representative == (0, 3)


def test_traced_graph_has_a_growing_cache_for_each_template() -> None:
    graph = exported("qwen2_moe", **MIXED).traced.model.graph
    caches = [name(layer) for layer in (0, 1) for name in (names.past_key, names.past_value)]
    assert [value.name for value in graph.inputs] == [names.INPUT_IDS, ATTENTION_MASK, names.POSITION_IDS, *caches]
    present = [name(layer) for layer in (0, 1) for name in (names.present_key, names.present_value)]
    assert [value.name for value in graph.outputs] == [names.LOGITS, *present]


@pytest.mark.parametrize(("kind", "config"), [("qwen2", DENSE), ("qwen2_moe", MIXED)])
def test_initializers_are_the_checkpoints_tensors_by_name_shape_and_value(kind: Any, config: dict[str, Any]) -> None:
    source = exported(kind, **config)
    state = source.reference().state_dict()
    found = _computed(source.traced.model)
    for name, tensor in found.items():
        stored = state[checkpoint_name(name, source.traced.representative)].numpy()
        assert np.array_equal(tensor.numpy(), stored), name
    expected = {
        name
        for name in state
        if not name.startswith("model.layers.") or name.split(".")[2] in map(str, source.traced.representative)
    }
    traced_names = {checkpoint_name(name, source.traced.representative) for name in found}
    assert traced_names | {"lm_head.weight", "model.embed_tokens.weight"} == expected


def test_weights_of_another_dtype_are_cast_when_read_only() -> None:
    source = exported("qwen2_moe", dtype=ir.DataType.FLOAT16, num_hidden_layers=3, num_experts_per_tok=6)
    assert {tensor.dtype for tensor in _computed(source.traced.model).values()} == {ir.DataType.FLOAT16}


def test_traced_name_of_a_later_kind_is_the_checkpoint_layer_it_stands_for() -> None:
    assert checkpoint_name("model.layers.1.mlp.gate.weight", (0, 13)) == "model.layers.13.mlp.gate.weight"
    assert checkpoint_name("model.norm.weight", (0, 13)) == "model.norm.weight"


@pytest.mark.parametrize(("kind", "config"), [("qwen2", DENSE), ("qwen2_moe", SPARSE)])
def test_rotary_frequencies_are_transformers(kind: Any, config: dict[str, Any]) -> None:
    source = exported(kind, **config)
    rotary = source.reference().model.rotary_emb
    held = source.traced.model.graph.initializers["model.rotary_emb.inv_freq"].const_value
    assert held is not None and np.array_equal(held.numpy(), rotary.inv_freq.numpy())


def test_fused_rotary_tables_are_transformers() -> None:
    """Yarn also scales them."""
    import torch

    source = exported("qwen2", **DENSE)
    cos, sin = source.reference().model.rotary_emb(torch.zeros(1), torch.arange(256)[None])
    for name, expected in (("rope.cos_cache", cos), ("rope.sin_cache", sin)):
        held = source.fused.graph.initializers[name].const_value
        assert held is not None
        assert np.abs(held.numpy() - expected[0, :, :8].numpy()).max() < 1e-5


def test_no_weight_is_read_while_tracing(tmp_path: Path) -> None:
    """And tracing leaves the process as it was: its exporter's chatter is silenced for its time only."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", "qwen2", dtype="bfloat16", tokenizer=False))
    before = logging.root.manager.disable, list(warnings.filters)
    with no_weight_is_read():
        with pytest.raises(AssertionError, match="was read"):
            checkpoint.tensor("model.norm.weight").numpy()
        traced = trace(checkpoint, ir.DataType.FLOAT)
    assert (logging.root.manager.disable, list(warnings.filters)) == before
    tensor = _computed(traced.model)["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(tensor, weights.DerivedTensor) and tensor.dtype == ir.DataType.FLOAT
    stored = checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    assert np.array_equal(tensor.numpy(), stored.numpy().astype(np.float32))


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"])
def test_template_has_the_kinds_of_layers_in_order(tmp_path: Path, kind: Any) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    sparse = {"decoder_sparse_step": 2} if kind.endswith("moe") else {}
    folder = make_checkpoint(tmp_path, kind, tokenizer=False, num_hidden_layers=5, **sliding, **sparse)
    config = Checkpoint.open(folder).config
    kinds = list(dict.fromkeys(config.layer_kinds))
    assert len(kinds) >= 2
    short = template_config(config, kinds)
    assert short.num_hidden_layers == len(kinds)
    assert [name == "sliding_attention" for name in short.layer_types] == [k.sliding_window is not None for k in kinds]
    if sparse:
        dense = [index for index, kind in enumerate(kinds) if not kind.sparse]
        assert short.mlp_only_layers == dense and short.decoder_sparse_step == 1
    assert config.to_transformers().num_hidden_layers == 5


def test_tensor_of_another_shape_than_the_traced_one_is_an_internal_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "qwen2", tokenizer=False))
    norm = ir.Value(name="model.norm.weight", shape=ir.Shape([32]), type=ir.TensorType(ir.DataType.FLOAT))
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[norm]), ir_version=11)
    monkeypatch.setattr(tracing, "_trace_meta_model", lambda *_: model)
    with pytest.raises(RuntimeError, match=r"model.norm.weight is \[32\], the checkpoint's tensor \[64\]"):
        trace(checkpoint, ir.DataType.FLOAT)
