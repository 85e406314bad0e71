"""TensorRT lowerings against the portable form, run with their plugin and TensorRT nodes replaced by references."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import names, op_spec
from qwenforge.graph_passes.lower import lower
from support.checkpoints import Kind
from support.lowered_answers import CAPACITY, answers
from support.portable_models import portable_model, random_model
from support.small_graphs import Array, ops, relative_error
from support.tensorrt_choices import LOWERINGS, lowering
from support.tolerances import FLOAT32_MODEL

HALF_BOUND = 2e-2
"""Two fp16 models of two layers against each other, relative: each is within 1 % of the fp32 one."""

GEOMETRIES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "one key/value head, 7 query heads": (
        "qwen2",
        {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    "as many key/value heads": ("qwen2", {"num_key_value_heads": 4}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "head size 24, norms of heads": (
        "qwen3",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
    ),
    "window in the upper layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "8 of 64 experts": ("qwen2_moe", {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True}),
    "1 of 3 experts": ("qwen2_moe", {"num_experts": 3, "num_experts_per_tok": 1, "norm_topk_prob": False}),
    "shared expert no multiple of a routed one": (
        "qwen2_moe",
        {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 64},
    ),
    "shared expert smaller than a routed one": (
        "qwen2_moe",
        {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 16},
    ),
    "no shared expert": ("qwen3_moe", {"head_dim": 16, "norm_topk_prob": True}),
    "dense layers among experts": ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
}


@functools.cache
def _portable(name: str, dtype: ir.DataType) -> tuple[ir.Model, tuple[Array, Array]]:
    """The portable model, and what it answers."""
    kind, config = GEOMETRIES[name]
    model = portable_model(random_model(kind, rounded_to=dtype.numpy().name, seed=2, **config), dtype=dtype)
    return model, answers(model)


@pytest.mark.parametrize("how", LOWERINGS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_lowered_model_answers_as_the_portable_one(name: str, how: str) -> None:
    model, expected = _portable(name, ir.DataType.FLOAT)
    lowered = lower(model.clone(), lowering(how).target, choice=lowering(how), capacity=CAPACITY)
    assert {node.op_type for node in lowered.graph if node.domain == names.DOMAIN} <= _PLUGINS
    for found, wanted in zip(answers(lowered), expected, strict=True):
        assert np.abs(found - wanted).max() < FLOAT32_MODEL


@pytest.mark.parametrize("how", ["native", "opset 20"])
@pytest.mark.parametrize("name", ["one key/value head, 7 query heads", "window in the upper layer", "tied"])
def test_lowered_model_in_half_precision_is_near_the_portable_one(name: str, how: str) -> None:
    model, expected = _portable(name, ir.DataType.FLOAT16)
    lowered = lower(model.clone(), lowering(how).target, choice=lowering(how), capacity=CAPACITY)
    for found, wanted in zip(answers(lowered), expected, strict=True):
        assert relative_error(found, wanted) < HALF_BOUND


_PLUGINS = {op_spec.load(plugin).name for plugin in op_spec.PLUGINS}
_NATIVE = {"TRT_Attention", "TensorScatter", "RotaryEmbedding"}


@pytest.mark.parametrize("how", LOWERINGS)
def test_layers_are_what_was_chosen(how: str) -> None:
    choice = lowering(how)
    found = Counter(
        ops(lower(_portable("8 of 64 experts", ir.DataType.FLOAT)[0].clone(), choice.target, choice=choice))
    )
    if choice.attention == "native":
        assert found["TRT_Attention"] == 2 and found["TensorScatter"] == 4 and "QwenForgeAttention" not in found
    else:
        assert found["QwenForgeAttention"] == 2 and not _NATIVE & set(found)
    assert found["QwenForgeMoE" if choice.experts == "plugin" else "TRT_MoE"] == 2
    assert ("TRT_MoE" in found) == (how == "native experts")


def test_layers_with_a_window_take_the_plugin_beside_native_ones() -> None:
    model, _ = _portable("window in the upper layer", ir.DataType.FLOAT)
    found = Counter(ops(lower(model.clone(), "tensorrt-rtx", choice=lowering("rtx"))))
    assert (found["TRT_Attention"], found["QwenForgeAttention"]) == (1, 1)


def test_old_parser_gets_opset_20_and_nothing_newer() -> None:
    model, _ = _portable("dense layers among experts", ir.DataType.FLOAT)
    lowered = lower(model.clone(), "tensorrt", choice=lowering("opset 20"), capacity=CAPACITY)
    assert (lowered.graph.opset_imports[""], lowered.ir_version) == (20, 10)
    newer = {"RMSNormalization", "Swish", "TensorScatter", "RotaryEmbedding", "Attention"}
    assert not newer & set(ops(lowered))


@pytest.mark.parametrize("how", ["native", "opset 20"])
def test_capacity_is_static_and_batch_and_sequence_stay_dynamic(how: str) -> None:
    model, _ = _portable("tied", ir.DataType.FLOAT)
    lowered = lower(model.clone(), "tensorrt", choice=lowering(how), capacity=40)
    shapes = {value.name: value.shape for value in (*lowered.graph.inputs, *lowered.graph.outputs)}
    caches = [shape for name, shape in shapes.items() if name is not None and "key" in name]
    assert caches and all(shape is not None and shape[2] == 40 for shape in caches)
    tokens = shapes[names.INPUT_IDS]
    assert tokens is not None and [str(dim) for dim in tokens] == [names.BATCH, names.SEQUENCE]


@pytest.mark.parametrize("how", LOWERINGS)
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", ["tied", "8 of 64 experts"])
def test_graph_is_in_16_bits_and_logits_are_fp32(name: str, dtype: ir.DataType, how: str) -> None:
    """fp32 is left in the router's softmax, the norms' sums and a scale that 16 bits cannot hold, and nowhere else."""
    kind, config = GEOMETRIES[name]
    model = portable_model(random_model(kind, rounded_to="float16", seed=2, **config), dtype=dtype)
    lowered = lower(model, lowering(how).target, choice=lowering(how), capacity=CAPACITY)
    outputs = {value.name: value.dtype for value in lowered.graph.outputs}
    assert outputs.pop(names.LOGITS) == ir.DataType.FLOAT
    assert set(outputs.values()) == {dtype}
    weights = {v.dtype for v in lowered.graph.initializers.values() if v.shape is not None and len(v.shape) > 1}
    assert weights == {dtype}
    products = [node for node in lowered.graph if node.op_type in {"MatMul", *_PLUGINS, "TRT_Attention", "TRT_MoE"}]
    assert products and {node.outputs[0].dtype for node in products} == {dtype}
