"""The roles of inputs and outputs in graphs of every origin."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qwenforge.errors import GraphError
from qwenforge.graph_passes.signature import LayerCache, detect_signature
from support.foreign_graphs import ForeignGraph, foreign_model
from support.toy_attention import toy_attention


def test_in_place_form_is_recognized_with_all_its_inputs() -> None:
    signature = detect_signature(toy_attention("in_place"))
    assert signature.form == "in_place"
    assert (signature.cache_position, signature.logits_index) == ("cache_position", "logits_index")
    assert signature.attention_mask is None
    assert signature.layers == (
        LayerCache("past_key_values.0.key", "past_key_values.0.value", "present.0.key", "present.0.value"),
    )


def test_growing_form_is_recognized_with_mask_and_positions() -> None:
    signature = detect_signature(toy_attention("growing"))
    assert signature.form == "growing"
    assert (signature.attention_mask, signature.position_ids) == ("attention_mask", "position_ids")
    assert signature.has_past


@pytest.mark.parametrize("form", ["growing", "in_place"])
@pytest.mark.parametrize("swapped", [False, True])
def test_roles_come_from_structure_when_names_are_silent(form: str, swapped: bool) -> None:
    model = toy_attention(form, named=False)  # type: ignore[arg-type]
    if swapped:
        outputs = model.graph.outputs
        outputs[1], outputs[2] = outputs[2], outputs[1]
    assert detect_signature(model).layers == (LayerCache("past_0", "past_1", "present_0", "present_1"),)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("past_key_values.0.key", "past_key_values.0.value"),
        ("past_key_values.layers.0.keys", "past_key_values.layers.0.values"),
        ("output.past_key_values.layers.0.keys", "output.past_key_values.layers.0.values"),
        ("past_key_values_key_cache_0", "past_key_values_value_cache_0"),
        ("cache_key_cache_0", "cache_value_cache_0"),
        ("key_cache_0", "value_cache_0"),
        ("past_key_values_key_0", "past_key_values_value_0"),
        ("present_0_k", "present_0_v"),
    ],
)
def test_names_decide_where_they_spell_role_and_layer(key: str, value: str) -> None:
    model = toy_attention("growing", named=False)
    # The names are put on the wrong tensors, to see that they were believed and not the structure.
    model.graph.outputs[1].name, model.graph.outputs[2].name = value, key
    assert detect_signature(model).layers == (LayerCache("past_1", "past_0", key, value),)


@pytest.mark.parametrize(
    ("exporter", "attention"),
    [
        ("dynamo_prefill", "eager"),
        ("dynamo_cache", "eager"),
        ("dynamo_cache", "sdpa"),
        ("dynamo_flat", "eager"),
        ("onnx_exporter_decode", "eager"),
    ],
)
def test_exported_graph_has_the_same_roles_with_and_without_names(exporter: str, attention: str) -> None:
    model = foreign_model(ForeignGraph(exporter=exporter, attention=attention))  # type: ignore[arg-type]
    named = detect_signature(model)
    places = {value.name: f"out_{index}" for index, value in enumerate(model.graph.outputs)}
    places |= {value.name: f"in_{i}" for i, value in enumerate(model.graph.inputs) if len(value.shape or ()) == 4}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = places.get(value.name, value.name)
    anonymous = detect_signature(model)
    assert len(named.layers) == 2
    assert anonymous.form == named.form == "growing"
    assert anonymous.has_past == named.has_past == (exporter != "dynamo_prefill")
    for new, old in zip(anonymous.layers, named.layers, strict=True):
        assert (new.key_output, new.value_output) == (places[old.key_output], places[old.value_output])
        assert new.key_input == places.get(old.key_input)
        assert new.value_input == places.get(old.value_input)


def test_unknown_input_is_refused_by_name() -> None:
    model = toy_attention("growing")
    model.graph.inputs.append(
        ir.Value(name="token_type_ids", shape=ir.Shape(["B", "S"]), type=ir.TensorType(ir.DataType.INT64))
    )
    with pytest.raises(GraphError, match="token_type_ids"):
        detect_signature(model)


def test_unknown_output_is_refused_by_name() -> None:
    model = toy_attention("growing")
    hidden = next(node.outputs[0] for node in model.graph if node.outputs[0].name == "residual")
    hidden.shape, hidden.type = ir.Shape(["B", "S", 8]), ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(hidden)
    with pytest.raises(GraphError, match="residual"):
        detect_signature(model)


def test_missing_caches_are_refused() -> None:
    model = toy_attention("growing")
    del model.graph.outputs[1:]
    with pytest.raises(GraphError, match="use_cache=True"):
        detect_signature(model)


def test_four_dimensional_mask_is_refused() -> None:
    model = toy_attention("growing")
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    mask.shape = ir.Shape(["B", 1, "S", "T"])
    with pytest.raises(GraphError, match="attention_mask"):
        detect_signature(model)


def test_static_cache_without_cache_position_is_refused() -> None:
    model = toy_attention("in_place")
    position = next(value for value in model.graph.inputs if value.name == "cache_position")
    model.graph.inputs.remove(position)
    with pytest.raises(GraphError, match="DynamicCache"):
        detect_signature(model)


def test_output_that_extends_a_cache_of_another_name_is_refused() -> None:
    model = toy_attention("growing", named=False)
    model.graph.inputs[3].name, model.graph.outputs[1].name = "past_key_values.0.value", "present.0.key"
    with pytest.raises(GraphError, match="misnamed"):
        detect_signature(model)


def test_cache_used_as_key_and_value_is_refused_when_names_are_silent() -> None:
    model = toy_attention("growing", named=False)
    product = next(node for node in model.graph if node.outputs[0].name == "y_heads")
    product.replace_input_with(1, next(v for v in model.graph.outputs if v.name == "present_0"))
    with pytest.raises(GraphError, match="both a key and a value"):
        detect_signature(model)
