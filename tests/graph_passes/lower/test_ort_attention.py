"""The attention function as ``com.microsoft::GroupQueryAttention``: attributes, shared lengths, head sizes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from qwenforge import names
from qwenforge.graph_passes.functions import GROUPED_QUERY_ATTENTION
from qwenforge.graph_passes.lower.ort_attention import LowerAttention
from support.portable_models import portable_model, random_model
from support.small_graphs import apply_rule, ops


def _lowered(head_size: int, **config: Any) -> tuple[ir.Model, LowerAttention]:
    model = portable_model(random_model("qwen3", head_dim=head_size, **config))
    rule = LowerAttention()
    apply_rule(rule, model)
    return model, rule


def _attention(model: ir.Model, layer: int) -> ir.Node:
    return next(node for node in model.graph if node.name == f"model.layers.{layer}.self_attn.attention")


def test_attention_keeps_its_name_and_reads_the_cache_inputs() -> None:
    model, rule = _lowered(16)
    assert rule.matches == 2 and not rule.failures
    node = _attention(model, 1)
    assert (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention")
    read = [value.name if value is not None else None for value in node.inputs]
    assert read[3:5] == [names.past_key(1), names.past_value(1)] and read[9] == names.POSITION_IDS
    assert [value.name for value in node.outputs[1:]] == [names.present_key(1), names.present_value(1)]
    wanted = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "local_window_size": -1}
    assert {name: node.attributes[name].as_int() for name in wanted} == wanted
    assert node.attributes["scale"].as_float() == pytest.approx(0.25)


def test_lengths_are_computed_once_for_all_layers() -> None:
    model, _ = _lowered(16, num_hidden_layers=4)
    for op_type in ("Cast", "Sub", "ReduceMax"):
        assert ops(model).count(op_type) == 1
    shared = {_attention(model, layer).inputs[5:7] for layer in range(4)}
    assert len(shared) == 1


def test_graph_of_other_input_names_is_lowered_too() -> None:
    model = portable_model(random_model("qwen2"))
    for value in model.graph.inputs:
        value.name = f"other.{value.name}"
    assert apply_rule(LowerAttention(), model).matches == 2


def test_lengths_follow_positions_that_are_computed() -> None:
    """position_ids is no graph input here: the lengths come after the node that makes it."""
    model = portable_model(random_model("qwen2"))
    given = next(value for value in model.graph.inputs if value.name == names.POSITION_IDS)
    users = list(given.uses())
    same = ir.node("Identity", [given], name="positions")
    same.outputs[0].type, same.outputs[0].shape = given.type, given.shape
    model.graph.insert_before(model.graph[0], same)
    for node, index in users:
        node.replace_input_with(index, same.outputs[0])
    apply_rule(LowerAttention(), model)
    names_in_order = [node.name for node in model.graph]
    assert names_in_order.index("positions") < names_in_order.index("attention.new_tokens")


def test_sliding_window_reaches_the_layers_that_have_one() -> None:
    model, _ = _lowered(16, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    windows = [_attention(model, layer).attributes["local_window_size"].as_int() for layer in (0, 1)]
    assert windows == [-1, 5]


def test_head_size_of_a_multiple_of_eight_is_rotated_outside_the_kernel() -> None:
    model, rule = _lowered(24)
    assert rule.matches == 2 and ops(model).count("RotaryEmbedding") == 4
    node = _attention(model, 0)
    assert node.attributes["do_rotary"].as_int() == 0 and len(node.inputs) == 7


def test_other_head_sizes_keep_the_function_and_say_why() -> None:
    model, rule = _lowered(20)
    assert rule.matches == 0 and len(rule.failures) == 2
    assert "a head size of 20 is no multiple of 8" in rule.failures[0] and "model.layers.0" in rule.failures[0]
    assert ops(model).count(GROUPED_QUERY_ATTENTION) == 2 and "GroupQueryAttention" not in ops(model)


def test_head_size_that_is_not_known_keeps_the_function() -> None:
    model = portable_model(random_model("qwen2"))
    for value in model.graph.inputs:
        if str(value.name).startswith("past_key_values"):
            value.shape = None
    rule = apply_rule(LowerAttention(), model)
    assert rule.matches == 0 and "a head size of None" in rule.failures[0]
