"""The portable form's names, dimensions and order, whatever the graph called its inputs and outputs before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qwenforge.graph_passes.fuse.portable_signature import PortableSignature
from support.small_graphs import Array, answers, apply_rule, normal, ops
from support.toy_attention import toy_attention

INPUTS = {
    "input_ids": "[batch,sequence]",
    "position_ids": "[batch,sequence]",
    "cache_position": "[batch]",
    "logits_index": "[batch,logits_count]",
    "past_key_values.0.key": "[batch,2,capacity,4]",
    "past_key_values.0.value": "[batch,2,capacity,4]",
}
OUTPUTS = {
    "logits": "[batch,logits_count,16]",
    "present.0.key": "[batch,2,capacity,4]",
    "present.0.value": "[batch,2,capacity,4]",
}
Change = Callable[[ir.Model], None]


def _value(model: ir.Model, name: str) -> ir.Value:
    made = [output for node in model.graph for output in node.outputs]
    return next(value for value in (*model.graph.inputs, *made) if value.name == name)


def _crossing(model: ir.Model) -> list[dict[str, str]]:
    return [
        {str(value.name): str(value.shape) for value in values} for values in (model.graph.inputs, model.graph.outputs)
    ]


def _feeds(rows: int = 2, new: int = 3) -> dict[str, Array]:
    tokens = np.random.default_rng(0).integers(0, 16, (rows, new))
    return {
        "input_ids": tokens,
        "position_ids": 5 + np.tile(np.arange(new), (rows, 1)),
        "cache_position": np.full(rows, 5),
        "logits_index": np.full((rows, 1), new - 1),
        "past_key_values.0.key": normal(rows, 2, 12, 4),
        "past_key_values.0.value": normal(rows, 2, 12, 4, seed=1),
    }


def _is_portable(model: ir.Model) -> None:
    inputs, outputs = _crossing(model)
    assert list(inputs.items()) == list(INPUTS.items()) and list(outputs.items()) == list(OUTPUTS.items())
    onnx.checker.check_model(ir.to_proto(model))


def _rename(names: dict[str, str]) -> Change:
    def change(model: ir.Model) -> None:
        for old, new in names.items():
            _value(model, old).name = new

    return change


def _shuffle(model: ir.Model) -> None:
    model.graph.inputs.reverse()
    model.graph.outputs.reverse()


def _value_called_like(name: str, output: str) -> Change:
    """The graph's output ``name`` has another name, and an inner value has this one."""

    def change(model: ir.Model) -> None:
        _value(model, name).name = output
        _value(model, "residual").name = name

    return change


def _weight_called_like_an_input(model: ir.Model) -> None:
    _value(model, "past_0").name = "layer_0_key"
    _value(model, "past_1").name = "layer_0_value"
    model.graph.initializers["wq"].name = "past_key_values.0.key"


def _unread_mask(model: ir.Model) -> None:
    kind = ir.TensorType(ir.DataType.INT64)
    model.graph.inputs.append(ir.Value(name="attention_mask", shape=ir.Shape(["B", "T"]), type=kind))


FORMS: dict[str, Change] = {
    "caches told by the structure": lambda model: None,
    "caches told by their names": _rename({"past_0": "k_cache_0", "past_1": "v_cache_0"}),
    "inputs in a folder": _rename({"input_ids": "model/input_ids", "position_ids": "model/position_ids"}),
    "another name of the logits": _rename({"logits": "output_0"}),
    "keys and values called like each other": _rename({"present_0": "a_0", "past_1": "b_0", "past_0": "c_0"}),
    "inputs and outputs in another order": _shuffle,
    "an inner value called like the logits": _value_called_like("logits", "output_0"),
    "an inner value called like a cache": _rename({"residual": "present.0.key", "mask": "past_key_values.0.value"}),
    "a weight called like a cache": _weight_called_like_an_input,
    "a mask that nothing reads": _unread_mask,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_signature_becomes_portable_and_computes_the_same(form: str) -> None:
    model, feeds = toy_attention("in_place", named=False), _feeds()
    before = dict(zip(("past_0", "past_1"), list(feeds)[4:], strict=True))
    expected = answers(model, **{name: feeds[before.get(name, name)] for name in _crossing(model)[0]})
    FORMS[form](model)
    nodes = ops(model)
    rule = apply_rule(PortableSignature(), model)
    assert rule.matches == 1 and rule.failures == [] and ops(model) == nodes
    _is_portable(model)
    found = answers(model, **feeds)
    assert all(np.array_equal(new, old) for new, old in zip(found, expected, strict=True))


def test_portable_graph_is_left_as_it_is() -> None:
    model = toy_attention("in_place")
    apply_rule(PortableSignature(), model)
    again = apply_rule(PortableSignature(), model)
    assert again.matches == 0 and again.failures == []
    _is_portable(model)


def test_inner_shapes_speak_of_the_same_dimensions() -> None:
    model = toy_attention("in_place")
    _value(model, "x").shape = ir.Shape(["B", "S", 8])
    _value(model, "weights").shape = ir.Shape(["B", 2, "S", None])
    apply_rule(PortableSignature(), model)
    assert str(_value(model, "x").shape) == "[batch,sequence,8]"
    assert str(_value(model, "weights").shape) == "[batch,2,sequence,None]"


def test_unknown_dimensions_are_not_taken_for_the_sequence() -> None:
    """An unknown dimension of the tokens equals every other unknown one."""
    model = toy_attention("in_place")
    _value(model, "input_ids").shape = ir.Shape([None, None])
    _value(model, "weights").shape = ir.Shape([None, 2, None, "M"])
    assert apply_rule(PortableSignature(), model).failures == []
    assert str(_value(model, "weights").shape) == "[None,2,None,M]"
    _is_portable(model)


@pytest.mark.parametrize(
    ("batch", "new", "capacity"), [("B", 1, "M"), (1, "S", "M"), (2, 3, 12)], ids=["one token", "one row", "everything"]
)
def test_fixed_sizes_stay_in_the_shapes_and_are_told(batch: int | str, new: int | str, capacity: int | str) -> None:
    model = toy_attention("in_place")
    _value(model, "input_ids").shape = ir.Shape([batch, new])
    for name in ("past_key_values.0.key", "past_key_values.0.value", "present.0.key", "present.0.value"):
        _value(model, name).shape = ir.Shape([batch, 2, capacity, 4])
    rule = apply_rule(PortableSignature(), model)
    rows, tokens, places = (
        size if isinstance(size, int) else name
        for size, name in zip((batch, new, capacity), ("batch", "sequence", "capacity"), strict=True)
    )
    assert rule.matches == 1
    assert rule.failures == [f"the graph was exported for input_ids of the fixed sizes [{rows}, {tokens}] only"]
    inputs, outputs = _crossing(model)
    assert inputs["input_ids"] == inputs["position_ids"] == f"[{rows},{tokens}]"
    assert inputs["cache_position"] == f"[{rows}]" and inputs["logits_index"] == f"[{rows},logits_count]"
    assert inputs["past_key_values.0.key"] == outputs["present.0.value"] == f"[{rows},2,{places},4]"
    assert outputs["logits"] == f"[{rows},logits_count,16]"


def test_fixed_capacity_alone_is_part_of_the_form() -> None:
    model = toy_attention("in_place")
    for name in ("past_key_values.0.key", "past_key_values.0.value", "present.0.key", "present.0.value"):
        _value(model, name).shape = ir.Shape(["B", 2, 12, 4])
    rule = apply_rule(PortableSignature(), model)
    assert rule.matches == 1 and rule.failures == []
    assert _crossing(model)[0]["past_key_values.0.key"] == "[batch,2,12,4]"


def _reads_a_mask(model: ir.Model) -> None:
    """The residual is scaled by each row's mask, so that the mask cannot go."""
    _unread_mask(model)
    mask, residual = model.graph.inputs[-1], _value(model, "residual")
    axes = ir.node("Constant", [], {"value_ints": [1]})
    largest = ir.node("ReduceMax", [mask, axes.outputs[0]])
    third = ir.node("Unsqueeze", [largest.outputs[0], axes.outputs[0]])
    real = ir.node("Cast", [third.outputs[0]], {"to": ir.DataType.FLOAT.value})
    product = ir.node("Mul", [residual, real.outputs[0]])
    users = [use for use, _ in residual.uses() if use is not product]
    producer = residual.producer()
    assert producer is not None
    model.graph.insert_after(producer, [axes, largest, third, real, product])
    for user in users:
        user.replace_input_with(0, product.outputs[0])


def _all_logits(model: ir.Model) -> None:
    chosen = _value(model, "chosen")
    chosen.replace_all_uses_with(_value(model, "residual"))
    model.graph.inputs.remove(_value(model, "logits_index"))


LOOK_ALIKES: dict[str, tuple[Change, str]] = {
    "a mask is read": (
        _reads_a_mask,
        "the graph still reads its padding mask attention_mask: its attention was not fused",
    ),
    "every token's logits": (_all_logits, "the graph does not choose the tokens whose logits it computes"),
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_other_signature_stays_and_is_told(case: str) -> None:
    change, reason = LOOK_ALIKES[case]
    model = toy_attention("in_place", named=False)
    change(model)
    before = _crossing(model)
    rule = PortableSignature()
    rule(model)
    assert rule.matches == 0 and rule.failures == [reason] and _crossing(model) == before


@pytest.mark.parametrize("named", [False, True])
def test_growing_cache_stays_and_is_told(named: bool) -> None:
    model = toy_attention("growing", named=named)
    before = _crossing(model)
    rule = PortableSignature()
    rule(model)
    assert rule.matches == 0 and _crossing(model) == before
    assert rule.failures == ["the graph is not in the in-place form: its attention was not fused"]
