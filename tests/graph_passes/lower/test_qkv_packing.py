"""Three projections as one in front of the attention kernel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.exporter import weights
from qwenforge.graph_passes.lower.ort_attention import LowerAttention
from qwenforge.graph_passes.lower.qkv_packing import PackQKV
from support.portable_models import portable_model, random_model
from support.small_graphs import apply_rule, ops


def _attended(kind: str = "qwen2", **config: object) -> ir.Model:
    model = portable_model(random_model(kind, **config))  # type: ignore[arg-type]
    apply_rule(LowerAttention(), model)
    return model


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def test_projections_are_merged_in_the_order_q_k_v() -> None:
    model = _attended(num_key_value_heads=1)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    products = ops(model).count("MatMul")
    assert apply_rule(PackQKV(), model).matches == 2
    assert ops(model).count("MatMul") == products - 4
    attention = _node(model, "model.layers.1.self_attn.attention")
    assert attention.inputs[1] is None and attention.inputs[2] is None
    packed = attention.inputs[0]
    assert packed is not None and packed.shape is not None and packed.shape[2] == 64 + 2 * 16
    for part, axis in (("weight", 1), ("bias", 0)):
        merged = model.graph.initializers[f"model.layers.1.self_attn.qkv_proj.{part}"].const_value
        suffix = "weight.transposed" if part == "weight" else "bias"
        parts = [before[f"model.layers.1.self_attn.{kind}_proj.{suffix}"] for kind in "qkv"]
        wanted = np.concatenate([tensor.numpy() for tensor in parts if tensor is not None], axis)
        assert isinstance(merged, weights.DerivedTensor) and np.array_equal(merged.numpy(), wanted)


def test_projections_without_bias_need_no_addition() -> None:
    """Qwen3 without its norms: nothing stands between the projections and the attention."""
    model = portable_model(random_model("qwen3", head_dim=16))
    for node in list(model.graph):
        if node.op_type == "Reshape" and (node.name or "").endswith("_norm.join"):
            norm = node.inputs[0]
            split = norm.producer().inputs[0].producer() if norm is not None else None  # type: ignore[union-attr]
            assert split is not None and split.inputs[0] is not None
            node.outputs[0].replace_all_uses_with(split.inputs[0])
    apply_rule(LowerAttention(), model)
    assert apply_rule(PackQKV(), model).matches == 2
    packed = _node(model, "model.layers.0.self_attn.attention").inputs[0]
    producer = packed.producer() if packed is not None else None
    assert producer is not None
    assert (producer.op_type, producer.name) == ("MatMul", "model.layers.0.self_attn.qkv_proj")


def _refused(model: ir.Model, reason: str, matches: int = 1) -> None:
    rule = apply_rule(PackQKV(), model)
    assert rule.matches == matches and any(reason in failure for failure in rule.failures)


@pytest.mark.parametrize("head_size", [16, 24])
def test_norm_or_rotation_between_keeps_the_projections_apart(head_size: int) -> None:
    _refused(_attended("qwen3", head_dim=head_size), "not a projection alone", matches=0)


def test_bias_of_one_projection_only_keeps_them_apart() -> None:
    model = _attended()
    added = _node(model, "model.layers.0.self_attn.k_proj")
    assert added.inputs[0] is not None
    added.outputs[0].replace_all_uses_with(added.inputs[0])
    _refused(model, "only some have a bias")


def test_bias_of_one_number_keeps_them_apart() -> None:
    model = _attended()
    bias = model.graph.initializers["model.layers.0.self_attn.v_proj.bias"]
    bias.const_value, bias.shape = ir.tensor(np.ones(1, np.float32), name="one"), ir.Shape([1])
    _refused(model, "not a projection alone")


def test_projections_of_different_tensors_are_kept_apart() -> None:
    model = _attended()
    embedded = _node(model, "model.embed_tokens").outputs[0]
    _node(model, "model.layers.0.self_attn.v_proj.product").replace_input_with(0, embedded)
    _refused(model, "project different tensors")


def test_projection_with_another_use_is_kept() -> None:
    model = _attended()
    keys = _node(model, "model.layers.0.self_attn.k_proj").outputs[0]
    model.graph.outputs.append(keys)
    twice = ir.node("Identity", [keys], name="again")
    model.graph.insert_after(keys.producer(), twice)  # type: ignore[arg-type]
    model.graph.outputs[-1] = twice.outputs[0]
    _refused(model, "another use")


def test_weight_that_is_computed_is_no_projection() -> None:
    model = _attended()
    product = _node(model, "model.layers.0.self_attn.q_proj.product")
    weight = product.inputs[1]
    copy = ir.node("Identity", [weight], name="computed")
    model.graph.insert_before(product, copy)
    product.replace_input_with(1, copy.outputs[0])
    _refused(model, "not a projection alone")
