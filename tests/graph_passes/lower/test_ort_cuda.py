"""The ort-cuda lowering against the portable form, our ops run from their reference bodies; size and operators."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import names, op_spec, ort_cuda_choice
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.lower.ort_cuda_kernels import HOST_OPERATORS, KERNELS, without_kernel
from qwenforge.graph_passes.lower.ort_cuda_ops import FoldHeadNorms
from qwenforge.graph_passes.pipeline import optimize
from qwenforge.graph_passes.quantize.apply import apply_plan
from qwenforge.tensorrt_choice import Operator
from support.checkpoints import Kind
from support.exported_models import DENSE, MIXED, SPARSE, exported
from support.foreign_graphs import ForeignGraph, foreign_model
from support.lowered_answers import answers
from support.portable_models import portable_model, random_model
from support.quantized_reference import Scheme, make_plan
from support.small_graphs import Array, apply_rule, ops
from support.tolerances import FLOAT32_MODEL

LAYER = re.compile(r"model\.layers\.(\d+)\.")
WAYS: list[tuple[Operator, Operator]] = [("native", "plugin"), ("plugin", "plugin"), ("native", "native")]
"""Who computes attention and experts."""

GEOMETRIES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "tied, one key/value head, 7 query heads": (
        "qwen2",
        {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "window in the upper layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "norms of heads": ("qwen3", {"head_dim": 32}),
    "norms of heads, head size 24": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}),
    "shared expert no multiple of a routed one": (
        "qwen2_moe",
        {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 64},
    ),
    "experts renormalized, norms of heads": ("qwen3_moe", {"head_dim": 16, "norm_topk_prob": True}),
}


def _lowered(model: ir.Model, attention: Operator = "plugin", experts: Operator = "plugin") -> ir.Model:
    choice = ort_cuda_choice.choose(attention=attention, experts=experts)
    return lower(model, "ort-cuda", choice=choice)


@functools.cache
def _portable(name: str) -> tuple[ir.Model, tuple[Array, Array]]:
    kind, config = GEOMETRIES[name]
    model = portable_model(random_model(kind, seed=2, **config))
    return model, answers(model)


@pytest.mark.parametrize(("attention", "experts"), WAYS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_lowered_model_answers_as_the_portable_one(name: str, attention: Operator, experts: Operator) -> None:
    model, expected = _portable(name)
    lowered = _lowered(model.clone(), attention, experts)
    assert not lowered.functions
    for found, wanted in zip(answers(lowered), expected, strict=True):
        assert np.abs(found - wanted).max() < FLOAT32_MODEL


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(("attention", "experts"), WAYS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_node_has_a_cuda_kernel(name: str, attention: Operator, experts: Operator, dtype: ir.DataType) -> None:
    kind, config = GEOMETRIES[name]
    model = portable_model(random_model(kind, rounded_to="float16", seed=2, **config), dtype=dtype)
    lowered = _lowered(model, attention, experts)
    assert without_kernel(lowered) == []
    for node in lowered.graph:
        kinds = {value.dtype for value in node.outputs if value.dtype is not None}
        if kinds <= {ir.DataType.INT32, ir.DataType.INT64} and node.op_type != "Unsqueeze":
            assert node.op_type in HOST_OPERATORS


def test_node_without_a_kernel_is_named() -> None:
    model = portable_model(random_model("qwen2"), dtype=ir.DataType.FLOAT16)
    lowered = _lowered(model)
    product = next(node for node in lowered.graph if node.op_type == "MatMul")
    product.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    swish = next(node for node in lowered.graph if node.op_type == "QuickGelu")
    swish.op_type = "Mish"
    found = without_kernel(lowered)
    assert len(found) == 2
    assert f"no CUDA kernel for MatMul in double (node {product.name})" in found[0]
    assert f"no CUDA kernel for Mish that is known here (node {swish.name})" in found[1]


def test_head_size_without_a_kernel_is_reported() -> None:
    model = portable_model(random_model("qwen2", hidden_size=48, num_attention_heads=4, num_key_value_heads=2))
    lowered = _lowered(model, "native")
    assert any("GroupedQueryAttention" in clause for clause in without_kernel(lowered))


def _by_layer(model: ir.Model) -> list[list[str]]:
    layers: dict[int, list[str]] = {}
    for node in model.graph:
        if match := LAYER.match(node.name or ""):
            layers.setdefault(int(match[1]), []).append(node.op_type)
    return [layers[layer] for layer in range(len(layers))]


def test_dense_layer_with_our_attention_consists_of_these_operators() -> None:
    """Those of ort-cpu, GroupQueryAttention replaced."""
    second = _by_layer(_lowered(exported("qwen2", **DENSE).portable()))[1]
    assert second == [
        *("SkipSimplifiedLayerNormalization", "MatMul", "Add", "QwenForgeAttention", "MatMul"),
        *("SkipSimplifiedLayerNormalization", "MatMul", "Split", "QuickGelu", "Mul", "MatMul"),
    ]


@pytest.mark.parametrize(
    ("kind", "config", "sizes"),
    [
        ("qwen2", DENSE, [11] * 6),
        ("qwen2_moe", SPARSE, [11] * 3),
        ("qwen2_moe", MIXED, [11, 11, 11, 11, 11, 11]),
        ("qwen3", {"num_hidden_layers": 3, "head_dim": 24, "num_attention_heads": 6}, [10] * 3),
    ],
)
def test_exported_layers_have_no_more_nodes_than_on_the_cpu(
    kind: Kind, config: dict[str, Any], sizes: list[int]
) -> None:
    """With our attention; qwen3's norms and rotations of q and k are in it, its projections one product, no bias."""
    portable = exported(kind, **config)
    found = [len(layer) for layer in _by_layer(_lowered(portable.portable()))]
    on_cpu = [len(layer) for layer in _by_layer(lower(portable.portable(), "ort-cpu"))]
    assert found == sizes
    assert all(ours <= theirs for ours, theirs in zip(found, on_cpu, strict=True))


@pytest.mark.parametrize(("attention", "experts"), WAYS)
def test_nothing_is_cast_or_copied_inside_a_layer(attention: Operator, experts: Operator) -> None:
    """One cast of the logits; two of int64 inputs for our attention, or one of the lengths for ONNX Runtime's."""
    model = portable_model(random_model("qwen2_moe", rounded_to="float16"), dtype=ir.DataType.FLOAT16)
    lowered = _lowered(model, attention, experts)
    casts = [node for node in lowered.graph if node.op_type == "Cast"]
    assert len(casts) == (3 if attention == "plugin" else 2)
    assert not any(LAYER.match(node.name or "") for node in casts)
    assert not {"TensorScatter", "Transpose", "Identity", "Expand", "ScatterND"} & set(ops(lowered))
    caches = [value for value in lowered.graph.inputs if (value.name or "").startswith("past_key_values.")]
    assert caches and all([node.op_type for node, _ in value.uses()] != ["Cast"] for value in caches)


def test_vocabulary_is_projected_for_the_wanted_tokens_only() -> None:
    lowered = _lowered(portable_model(random_model("qwen2", tie_word_embeddings=True)))
    (projection,) = (node for node in lowered.graph if node.op_type == "FusedMatMul")
    rows = projection.inputs[0]
    assert rows is not None and (producer := rows.producer()) is not None and producer.op_type == "GatherND"
    table = projection.inputs[1]
    assert table is not None and {node.op_type for node, _ in table.uses()} == {"Gather", "FusedMatMul"}


@pytest.mark.parametrize(
    "name", ["window in the upper layer", "norms of heads", "experts renormalized, norms of heads"]
)
def test_our_nodes_are_what_their_description_says(name: str) -> None:
    """Attributes, and inputs at their places: nothing where the attributes make one absent, none left at the end."""
    lowered = _lowered(_portable(name)[0].clone())
    known = {op_spec.load(plugin).name: op_spec.load(plugin) for plugin in op_spec.PLUGINS}
    nodes = [node for node in lowered.graph if node.domain == op_spec.NAMESPACE]
    assert nodes
    for node in nodes:
        spec = known[node.op_type]
        numbers = {attribute.name: node.attributes[attribute.name].value for attribute in spec.attributes}
        assert set(numbers) == set(node.attributes) and spec.problem(numbers) is None
        given = [spec.inputs[place].name for place, value in enumerate(node.inputs) if value is not None]
        assert given == spec.input_names(numbers) and node.inputs[-1] is not None
        assert len(node.outputs) == len(spec.outputs)
    attention = next(node for node in nodes if node.op_type == "QwenForgeAttention")
    assert attention.attributes["packed_qkv"].as_int() == 1 and attention.inputs[1] is attention.inputs[2] is None
    assert attention.attributes["qk_norm"].as_int() == ("norms" in name)


def _normed() -> ir.Model:
    """A qwen3 model up to our attention op, its norms still outside."""
    from qwenforge.graph_passes.lower.ort_cuda_ops import CustomAttention

    model = portable_model(random_model("qwen3", head_dim=16, num_hidden_layers=1))
    apply_rule(CustomAttention(), model)
    return model


def _norm(model: ir.Model, which: str) -> ir.Node:
    return next(node for node in model.graph if (node.name or "").endswith(f"{which}_norm"))


def _other_epsilon(model: ir.Model) -> None:
    _norm(model, "k").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


def _over_all_heads(model: ir.Model) -> None:
    _norm(model, "q").attributes["axis"] = ir.AttrInt64("axis", 2)


def _in_sixteen_bits(model: ir.Model) -> None:
    _norm(model, "q").attributes["stash_type"] = ir.AttrInt64("stash_type", ir.DataType.FLOAT16)


def _other_heads(model: ir.Model) -> None:
    split = _norm(model, "q").inputs[0]
    assert split is not None and split.shape is not None
    split.shape = ir.Shape([*split.shape[:2], 2, 32])


def _rows_change_places(model: ir.Model) -> None:
    split = _norm(model, "q").inputs[0]
    assert split is not None and split.shape is not None
    split.shape = ir.Shape([split.shape[1], split.shape[0], *split.shape[2:]])


def _only_one(model: ir.Model) -> None:
    norm = _norm(model, "k")
    norm.outputs[0].replace_all_uses_with(norm.inputs[0])  # type: ignore[arg-type]


def _computed_weight(model: ir.Model) -> None:
    norm = _norm(model, "q")
    doubled = ir.node("Add", [norm.inputs[1], norm.inputs[1]], name="doubled")
    doubled.outputs[0].shape, doubled.outputs[0].type = norm.inputs[1].shape, norm.inputs[1].type  # type: ignore[union-attr]
    model.graph.insert_before(norm, doubled)
    norm.replace_input_with(1, doubled.outputs[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_epsilon, "the norms of q and k have different epsilons"),
        (_over_all_heads, "the norm is not over the head size"),
        (_in_sixteen_bits, "the norm does not compute in fp32"),
        (_other_heads, "what is normalized is not [B, S, H, D], split from [B, S, H*D]"),
        (_rows_change_places, "batch and sequence change places before the norm"),
        (_only_one, "only one of q and k is normalized"),
        (_computed_weight, "the norm's weight is no constant of one number for each channel"),
    ],
)
def test_norms_that_the_op_does_not_compute_stay_outside(change: Any, reason: str) -> None:
    model = _normed()
    change(model)
    rule = apply_rule(FoldHeadNorms(), model)
    assert rule.matches == 0 and len(rule.failures) == 1 and rule.failures[0].startswith(reason)
    attention = next(node for node in model.graph if node.op_type == "QwenForgeAttention")
    assert attention.attributes["qk_norm"].as_int() == 0


def test_norms_are_folded_with_their_weights_and_epsilon() -> None:
    model = _normed()
    norms = [_norm(model, which) for which in "qk"]
    weights, epsilon = [norm.inputs[1] for norm in norms], norms[0].attributes["epsilon"].as_float()
    assert apply_rule(FoldHeadNorms(), model).matches == 1
    attention = next(node for node in model.graph if node.op_type == "QwenForgeAttention")
    assert list(attention.inputs[9:11]) == weights
    assert attention.attributes["epsilon"].as_float() == epsilon
    assert apply_rule(FoldHeadNorms(), model).matches == 0, "a second run finds nothing"


@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_foreign_graph_is_lowered_and_verified(attention: Operator) -> None:
    graph = foreign_model(ForeignGraph(kind="qwen3"))
    choice = ort_cuda_choice.choose(attention=attention)
    result = optimize(graph, target="ort-cuda", verify=True, choice=choice)
    assert not result.refused
    found = Counter(ops(result.model))
    assert found["QwenForgeAttention" if attention == "plugin" else "GroupQueryAttention"] == 2
    assert names.INPUT_IDS in [value.name for value in result.model.graph.inputs]


def test_table_holds_what_the_graphs_use_and_nothing_else() -> None:
    used = set()
    for kind, config in GEOMETRIES.values():
        for attention, experts in WAYS:
            model = portable_model(random_model(kind, seed=2, **config), dtype=ir.DataType.BFLOAT16)
            used |= {(node.domain, node.op_type) for node in _lowered(model, attention, experts).graph}
    used |= {(node.domain, node.op_type) for node in _lowered(exported("qwen2_moe", **SPARSE).portable()).graph}
    source = random_model("qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    quantized = portable_model(source, dtype=ir.DataType.BFLOAT16)
    apply_plan(quantized, make_plan(source, Scheme("int4", 64)))
    used |= {(node.domain, node.op_type) for node in _lowered(quantized).graph}
    assert set(KERNELS) == used
