"""The plugins' specifications: what an op.yaml can say, and that what it says is enforced."""

from __future__ import annotations

from typing import Any

import pytest

from qwenforge import op_spec

MOE: dict[str, int | float] = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_experts": 8,
    "first_local_expert": 0,
    "num_local_experts": 8,
    "num_shared_experts": 2,
    "top_k": 2,
    "normalize_topk": 0,
    "weight_type": 0,
    "group_size": 65536,
    "layout_version": 1,
}
ATTENTION: dict[str, int | float] = {
    "num_heads": 8,
    "num_key_value_heads": 2,
    "head_size": 64,
    "scale": 0.125,
    "sliding_window": 0,
    "cache_type": 0,
    "page_size": 0,
    "packed_qkv": 0,
    "qk_norm": 0,
    "epsilon": 1e-6,
}


@pytest.mark.parametrize("plugin", op_spec.PLUGINS)
def test_specification_is_loaded_and_speaks_of_its_own_attributes(plugin: str) -> None:
    spec = op_spec.load(plugin)
    attributes = {attribute.name for attribute in spec.attributes}
    assert spec.name.startswith("QwenForge") and spec.version.isdecimal() and len(spec.summary) > 20
    assert all(attribute.meaning for attribute in spec.attributes)
    for tensor in (tensor for tensor in spec.inputs if tensor.present_if):
        found = {bool(op_spec.evaluate(tensor.present_if, dict.fromkeys(attributes, number))) for number in (0, 1, 3)}
        assert found == {False, True}, f"{tensor.name} is always there, or never"
    assert {tensor.aliases for tensor in spec.outputs} - {None} <= {tensor.name for tensor in spec.inputs}


@pytest.mark.parametrize(("plugin", "attributes"), [("moe", MOE), ("attention", ATTENTION)])
def test_right_attributes_have_no_problem(plugin: str, attributes: dict[str, int | float]) -> None:
    assert op_spec.load(plugin).problem(attributes) is None


@pytest.mark.parametrize(
    ("plugin", "change", "problem"),
    [
        ("moe", {"top_k": 9}, "top_k"),
        ("moe", {"top_k": 0}, "top_k"),
        ("moe", {"num_experts": 257}, "num_experts"),
        ("moe", {"num_experts": 1}, "top_k is larger than num_experts"),
        ("moe", {"first_local_expert": 1}, "the local experts end behind num_experts"),
        ("moe", {"weight_type": 4}, "weight_type"),
        ("moe", {"weight_type": 1}, "intermediate_size that is a multiple of 64"),
        ("moe", {"weight_type": 1, "hidden_size": 96, "intermediate_size": 64}, "hidden_size that is a multiple of 64"),
        ("moe", {"weight_type": 1, "intermediate_size": 64, "group_size": 128}, "one scale a row"),
        ("moe", {"weight_type": 2, "intermediate_size": 64}, "INT4 weights need a group_size of 64 or 128"),
        ("moe", {"hidden_size": 63}, "hidden_size"),
        ("moe", {"layout_version": 2}, "layout_version"),
        ("moe", {"normalize_topk": None}, "normalize_topk"),
        ("attention", {"num_key_value_heads": 3}, "num_heads is no multiple"),
        ("attention", {"head_size": 12}, "head_size"),
        ("attention", {"cache_type": 3}, "cache_type"),
        ("attention", {"page_size": 8}, "page_size is no power of two from 16 on"),
        ("attention", {"page_size": 48}, "page_size is no power of two from 16 on"),
        ("attention", {"page_size": 8192}, "page_size"),
        ("attention", {"packed_qkv": 2}, "packed_qkv"),
        ("attention", {"qk_norm": None}, "qk_norm"),
        ("attention", {"epsilon": -1.0}, "epsilon"),
        ("attention", {"scale": -1.0}, "scale"),
        ("attention", {"scale": float("nan")}, "scale"),
        ("attention", {"sliding_window": -1}, "sliding_window"),
        ("attention", {"paged": 1}, "paged"),
    ],
)
def test_wrong_attribute_is_named(plugin: str, change: dict[str, Any], problem: str) -> None:
    attributes = {**(MOE if plugin == "moe" else ATTENTION), **change}
    given = {name: value for name, value in attributes.items() if value is not None}
    found = op_spec.load(plugin).problem(given)
    assert found is not None and problem in found


def test_absent_input_is_left_out() -> None:
    spec = op_spec.load("moe")
    assert "shared_gate_logits" in spec.input_names(MOE)
    assert "shared_gate_logits" not in spec.input_names({**MOE, "num_shared_experts": 0})
    assert "activation_scales" not in spec.input_names({**MOE, "weight_type": 1})
    assert spec.input_names({**MOE, "weight_type": 3})[-3:] == ["gate_up_scales", "down_scales", "activation_scales"]


def test_absent_inputs_of_attention_are_left_out() -> None:
    spec = op_spec.load("attention")
    plain = ["query", "key", "value", "past_key", "past_value", "cos", "sin", "position_ids", "cache_position"]
    assert spec.input_names(ATTENTION) == plain
    every = {**ATTENTION, "packed_qkv": 1, "qk_norm": 1, "cache_type": 2, "page_size": 16}
    last = ["query_norm", "key_norm", "key_scales", "value_scales", "page_table"]
    assert spec.input_names(every) == ["query", *plain[3:], *last]


@pytest.mark.parametrize("expression", ["__import__('os')", "a.b", "a[0]", "'text'", "a ** 2", "lambda: 1"])
def test_expression_is_arithmetic_and_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match="expression"):
        op_spec.evaluate(expression, {"a": 1})
