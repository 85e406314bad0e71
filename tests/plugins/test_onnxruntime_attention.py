"""QwenForgeAttention in real ONNX Runtime sessions, its kernels emulated: against float64, in place, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from support import simt
from support.attention_cases import DTYPES, Call, Inputs, Results, attended, linear, run, turned
from support.attention_nodes import (
    CACHE_NAMES,
    SPEC,
    attention_model,
    bind,
    results,
    run_in_place,
    tensors_of,
)
from support.ort_custom_op import session

pytestmark = pytest.mark.skipif(bool(simt.why_missing()), reason=simt.why_missing() or "-")

DECODE = Call(starts=(7, 0, 15))
PROMPT = Call(starts=(0, 0), sequence=5, heads=6)
CASES = {
    "decode": DECODE,
    "prompt": PROMPT,
    "continued prompt": Call(starts=(3, 9), sequence=4, capacity=40, heads=14, size=128, shift=2),
    "window": Call(starts=(12,), sequence=2, window=5),
    "head size without tiles": Call(starts=(4,), sequence=2, size=80),
    "packed": replace(DECODE, packed=True),
    "normalized": replace(PROMPT, norm=True),
    "packed and normalized": replace(PROMPT, packed=True, norm=True, heads=2),
    "int8": replace(DECODE, cache="int8"),
    "int8, prompt": replace(PROMPT, cache="int8", norm=True),
    "fp8": replace(DECODE, cache="fp8"),
    "fp8, packed prompt": replace(PROMPT, cache="fp8", packed=True),
    "paged": replace(DECODE, page_size=16, capacity=48, starts=(33, 0, 15)),
    "paged int8, packed and normalized": Call(
        starts=(30, 2), sequence=3, capacity=64, page_size=32, cache="int8", packed=True, norm=True
    ),
}


def _check(call: Call, inputs: Inputs, found: Results, tolerance: float) -> None:
    """Output and appended keys and values are those of float64."""
    keys, values = linear(call, inputs, found.key_cache, keys=True), linear(call, inputs, found.value_cache, keys=False)
    expected = turned(call, inputs, keys=True), inputs.value.double()
    scales = inputs.key_scales.double(), inputs.value_scales.double()[:, None]
    for row, start in enumerate(call.starts):
        for cache, new, step in zip((keys, values), expected, scales, strict=True):
            stored, exact = cache[row, :, start : start + call.sequence].transpose(0, 1), new[row]
            bound = tolerance * exact.abs().max()
            if call.cache == "int8":  # saturated, and off by less than a step
                exact, bound = exact.clamp(-128 * step, 127 * step), step.expand(exact.shape)
            elif call.cache == "fp8":
                exact = exact.clamp(-448 * step, 448 * step)
                bound = torch.maximum(exact.abs() / 8, step / 512)
            assert ((stored - exact).abs() <= bound).all()
    queries = turned(call, inputs, keys=False)
    output = attended(call, queries, keys, values)
    assert float((found.output.double() - output).abs().max() / output.abs().max()) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_session_agrees_with_float64_and_updates_the_caches_in_place(name: str, dtype: str) -> None:
    call, (kind, tolerance) = CASES[name], DTYPES[dtype]
    inputs = Inputs.random(call, kind, seed=len(name))
    found = results(session(attention_model(call, dtype)), call, inputs)
    _check(call, inputs, found, tolerance)
    if not simt.ON_GPU:
        # What the kernels' own tests prove of them, places of other tokens included, holds of the session's call.
        assert found.same_bits(run(call, inputs, dtype))


def test_one_session_takes_every_number_of_rows_tokens_and_capacity() -> None:
    made = session(attention_model(replace(DECODE, packed=True), "float16"))
    for starts, sequence, capacity in (((0,), 7, 7), ((7, 3, 0, 9), 1, 40), ((5, 5), 3, 130)):
        call = Call(starts=starts, sequence=sequence, capacity=capacity, packed=True, positions=150)
        inputs = Inputs.random(call, torch.float16)
        _check(call, inputs, results(made, call, inputs), DTYPES["float16"][1])
    call = replace(call, sequence=0)
    assert results(made, call, Inputs.random(call, torch.float16)).output.numel() == 0


@pytest.mark.parametrize("cache", ["float", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_have_types_and_shapes_before_anything_runs(dtype: str, cache: str) -> None:
    """Of the query's type and of the caches', by the names that the inputs' extents have, and with absent inputs."""
    model = attention_model(replace(DECODE, packed=True, cache=cache), dtype, static={"capacity": 32})
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    element = "int8" if cache == "int8" else dtype
    shape = ["cache_rows", 2, 32, 64]
    assert [(output.name, output.type, output.shape) for output in session(model).get_outputs()] == [
        ("output", f"tensor({dtype})", ["batch", "sequence", 256]),
        ("present_key", f"tensor({element})", shape),
        ("present_value", f"tensor({element})", shape),
    ]


def test_extents_without_a_name_leave_the_shapes_open() -> None:
    """They are not taken for one number: the declared outputs of any extents are right."""
    model = attention_model(DECODE, "float16", static={"batch": 3, "cache_rows": 3})
    for given in model.graph.input:
        for extent in given.type.tensor_type.shape.dim:
            extent.ClearField("dim_param")
    inputs = Inputs.random(DECODE, torch.float16)
    _check(DECODE, inputs, results(session(model), DECODE, inputs), DTYPES["float16"][1])


def _with_nodes(model: onnx.ModelProto, before: list[onnx.NodeProto], after: list[onnx.NodeProto]) -> None:
    nodes = [*before, onnx.NodeProto.FromString(model.graph.node[0].SerializeToString()), *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def test_caches_inside_of_a_graph_share_one_buffer() -> None:
    """Two layers over one pair of caches that the graph makes and reads itself: nothing has to be bound."""
    call = Call(starts=(3, 5))
    model = attention_model(call, "float16")
    (node,) = model.graph.node
    before, after = [], []
    second = onnx.NodeProto.FromString(node.SerializeToString())
    second.name = "layer 4"
    for index, past in enumerate(CACHE_NAMES):
        place = list(node.input).index(past)
        before.append(helper.make_node("Neg", [past], [f"{past}_negated"]))
        node.input[place] = f"{past}_negated"
        node.output[1 + index] = second.input[place] = f"{past}_between"
        second.output[1 + index] = f"{past}_twice"
        after.append(helper.make_node("Neg", [f"{past}_twice"], [CACHE_NAMES[past]]))
    node.output[0] = "first"
    second.output[0] = "output"
    _with_nodes(model, before, [second, *after])
    inputs = Inputs.random(call, torch.float16)
    feeds = {name: tensor.cpu().numpy() for name, tensor in tensors_of(call, inputs).items()}
    given = {name: feeds[name].copy() for name in CACHE_NAMES}
    output, keys, values = session(model).run(None, feeds)
    assert all(np.array_equal(feeds[name], given[name]) for name in CACHE_NAMES)
    negated = replace(inputs, key_cache=-inputs.key_cache, value_cache=-inputs.value_cache)
    found = Results(
        torch.from_numpy(output).view(inputs.query.shape), -torch.from_numpy(keys), -torch.from_numpy(values)
    )
    _check(call, negated, found, DTYPES["float16"][1])
    place = call.starts[0]
    assert torch.equal(found.key_cache[0, :, :place], negated.key_cache[0, :, :place])


def _call(made: Any, tensors: dict[str, torch.Tensor], call: Call, own: str | None = None) -> None:
    """One call; ``own`` is a cache that is given memory of its own as output."""
    binding = made.io_binding()
    output = torch.empty((call.rows, call.sequence, call.heads * call.size), dtype=torch.float16)
    kept = [output.to(tensors["query"].device)]
    for name, tensor in tensors.items():
        bind(binding.bind_input, name, tensor)
        if name in CACHE_NAMES:
            kept.append(tensor.clone() if name == own else tensor)
            bind(binding.bind_output, CACHE_NAMES[name], kept[-1])
    bind(binding.bind_output, "output", kept[0])
    made.run_with_iobinding(binding)


@pytest.mark.parametrize("cache", CACHE_NAMES)
def test_cache_with_memory_of_its_own_is_refused_and_says_how_to_bind(cache: str) -> None:
    made = session(attention_model(DECODE, "float16"))
    tensors = tensors_of(DECODE, Inputs.random(DECODE, torch.float16))
    kept = {name: tensors[name].clone() for name in CACHE_NAMES}
    sentence = (
        f"{CACHE_NAMES[cache]} is not at the address of {cache}, whose memory it has to share: bind one OrtValue "
    )
    with pytest.raises(Exception, match=sentence):
        _call(made, tensors, DECODE, own=cache)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    _call(made, tensors, DECODE)
    assert not torch.equal(tensors["past_key"], kept["past_key"])


@pytest.mark.skipif(simt.ON_GPU, reason="arrays are not on the GPU")
def test_call_without_bound_outputs_is_refused() -> None:
    made = session(attention_model(DECODE, "float16"))
    tensors = tensors_of(DECODE, Inputs.random(DECODE, torch.float16))
    with pytest.raises(Exception, match="present_key is not at the address of past_key"):
        made.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})


def _changed(tensors: dict[str, torch.Tensor], name: str, *shape: int) -> dict[str, torch.Tensor]:
    """``name`` of another shape, and its fellow cache with it."""
    names = CACHE_NAMES if name in CACHE_NAMES else (name,)
    return {**tensors, **{each: torch.zeros(shape, dtype=tensors[each].dtype) for each in names}}


PAGED = CASES["paged"]
WRONG_CALLS: dict[str, tuple[Call, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "another number of rows": (
        DECODE,
        lambda given: _changed(given, "past_key", 4, 2, 16, 64),
        "the caches have 4 rows for a batch of 3",
    ),
    "caches that differ": (
        DECODE,
        lambda given: {**given, "past_value": torch.zeros((3, 2, 17, 64), dtype=torch.float16)},
        "dimension 2 of past_value is 17, but capacity of past_key is 16",
    ),
    "positions for fewer rows": (
        DECODE,
        lambda given: _changed(given, "cache_position", 2),
        "dimension 0 of cache_position is 2, but batch of query is 3",
    ),
    "more tokens than a row has": (
        replace(PROMPT, capacity=8),
        lambda given: _changed(given, "past_key", 2, 2, 4, 64),
        "5 new tokens do not fit into a row of the caches, which has 4",
    ),
    "empty tables": (
        DECODE,
        lambda given: {**given, **{name: torch.zeros((0, 32), dtype=torch.float16) for name in ("cos", "sin")}},
        "the tables cos and sin are empty",
    ),
    "pages of another size": (
        PAGED,
        lambda given: _changed(given, "past_key", 12, 2, 32, 64),
        "a page of the caches has 32 tokens, but page_size is 16",
    ),
    "more tokens than pages": (
        replace(PAGED, sequence=20, starts=(0, 0, 0)),
        lambda given: _changed(given, "page_table", 3, 1),
        "20 new tokens do not fit into a row of the caches, which has 16",
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call_is_refused_in_a_sentence(name: str) -> None:
    call, change, sentence = WRONG_CALLS[name]
    made = session(attention_model(call, "float16"))
    tensors = tensors_of(call, Inputs.random(call, torch.float16))
    changed = {key: value.to(tensors["query"].device) for key, value in change(tensors).items()}
    with pytest.raises(Exception, match=sentence):
        _call(made, changed, call)


def _refusal(model: onnx.ModelProto) -> str:
    """What ONNX Runtime says of the node when the session is made."""
    with pytest.raises(Exception, match="QwenForgeAttention") as caught:
        session(model)
    assert type(caught.value).__module__.startswith("onnxruntime")
    return str(caught.value)


def _set(model: onnx.ModelProto, name: str, value: Any) -> None:
    (node,) = model.graph.node
    kept = [item for item in node.attribute if item.name != name]
    assert len(kept) == len(node.attribute) - 1
    del node.attribute[:]
    node.attribute.extend([*kept, *([] if value is None else [helper.make_attribute(name, value)])])


ATTRIBUTES: dict[str, tuple[Call, str, Any, str]] = {
    "heads of no group": (DECODE, "num_heads", 5, "num_heads is no multiple of num_key_value_heads"),
    "another kind of cache": (DECODE, "cache_type", 3, "cache_type is 3, above 2 (0 as the tokens, 1 FP8 E4M3"),
    "a page of no multiple of 16": (PAGED, "page_size", 24, "page_size is no power of two from 16 on"),
    "a page of no power of two": (PAGED, "page_size", 48, "page_size is no power of two from 16 on"),
    "an infinite scale": (DECODE, "scale", float("inf"), "scale is inf, not a number that can be computed with"),
    "an integer for a float": (DECODE, "epsilon", 1, "attribute epsilon is missing, or is no float"),
    "8 bits without scales": (DECODE, "cache_type", 2, "input key_scales is missing, which the attributes ask for"),
    "scales for 16 bits": (
        replace(DECODE, cache="int8"),
        "cache_type",
        0,
        "input key_scales is given, for which the attributes have no use",
    ),
    "packed, but key and value": (
        DECODE,
        "packed_qkv",
        1,
        "input key is given, for which the attributes have no use",
    ),
    "not packed": (
        replace(DECODE, packed=True),
        "packed_qkv",
        0,
        "input key is missing, which the attributes ask for",
    ),
    "a norm without weights": (DECODE, "qk_norm", 1, "input query_norm is missing, which the attributes ask for"),
    "weights without a norm": (
        replace(DECODE, norm=True),
        "qk_norm",
        0,
        "input query_norm is given, for which the attributes have no use",
    ),
    "pages without a table": (DECODE, "page_size", 16, "input page_table is missing, which the attributes ask for"),
    "a table without pages": (PAGED, "page_size", 0, "input page_table is given, for which the attributes have no use"),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_that_does_not_fit_is_refused_in_a_sentence(name: str) -> None:
    call, attribute, value, sentence = ATTRIBUTES[name]
    model = attention_model(call, "float16")
    _set(model, attribute, value)
    assert f"QwenForgeAttention 'layer 3': {sentence}" in _refusal(model)


@pytest.mark.parametrize("attribute", [attribute.name for attribute in SPEC.attributes])
def test_missing_attribute_is_named(attribute: str) -> None:
    model = attention_model(DECODE, "float16")
    _set(model, attribute, None)
    assert f"QwenForgeAttention 'layer 3': attribute {attribute} is missing" in _refusal(model)


def _retyped(model: onnx.ModelProto, name: str, element: int) -> onnx.ModelProto:
    """The input of another type; both caches that the node gives are of ``past_key``'s."""
    changed = {name, *(CACHE_NAMES.values() if name == "past_key" else ())}
    for info in [*model.graph.input, *model.graph.output]:
        if info.name in changed:
            info.type.tensor_type.elem_type = element
    return model


TYPES: dict[str, tuple[Call, str, int, str]] = {
    "tokens of two types": (DECODE, "key", TensorProto.BFLOAT16, "key is of type bfloat16, but query of type float16"),
    "8 bits, but caches of 16": (
        replace(DECODE, cache="fp8"),
        "past_key",
        TensorProto.FLOAT16,
        "past_key is of type float16, not int8",
    ),
    "16 bits, but caches of 8": (
        DECODE,
        "past_key",
        TensorProto.INT8,
        "past_key is of type int8, but query of type float16",
    ),
    "caches of the other 16 bits": (
        DECODE,
        "past_value",
        TensorProto.BFLOAT16,
        "past_value is of type bfloat16, but query of type float16",
    ),
    "wide positions": (DECODE, "position_ids", TensorProto.INT64, "position_ids is of type int64, not int32"),
    "scales of 16 bits": (
        replace(DECODE, cache="int8"),
        "key_scales",
        TensorProto.FLOAT16,
        "key_scales is of type float16, not float32",
    ),
}


@pytest.mark.parametrize("name", TYPES)
def test_tensor_of_another_type_is_refused_in_a_sentence(name: str) -> None:
    call, tensor, element, sentence = TYPES[name]
    refusal = _refusal(_retyped(attention_model(call, "float16"), tensor, element))
    assert f"QwenForgeAttention 'layer 3': {sentence}" in refusal


@pytest.mark.parametrize("tensor", ["query", "past_key"])
def test_type_that_no_registration_has_is_refused_by_onnx_runtime(tensor: str) -> None:
    refusal = _refusal(_retyped(attention_model(DECODE, "float16"), tensor, TensorProto.FLOAT))
    assert f"Type 'tensor(float)' of input parameter ({tensor}) of operator (QwenForgeAttention)" in refusal


def test_cache_that_is_a_constant_of_the_model_is_refused() -> None:
    """It would be written, and another one at the next call."""
    model = attention_model(Call(), "float16")
    cache = next(info for info in model.graph.input if info.name == "past_key")
    model.graph.input.remove(cache)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 2, 16, 64), np.float16), "past_key"))
    sentence = "past_key is a constant of the model, but it is updated in place: make it an input of the graph"
    assert f"QwenForgeAttention 'layer 3': {sentence}" in _refusal(model)


def test_extent_that_the_graph_knows_is_refused_when_the_session_is_made() -> None:
    model = attention_model(DECODE, "float16")
    (key,) = (info for info in model.graph.input if info.name == "key")
    key.type.tensor_type.shape.dim[2].dim_value = 100
    sentence = "dimension 2 of key is 100, but num_key_value_heads * head_size is 128"
    assert f"QwenForgeAttention 'layer 3': {sentence}" in _refusal(model)


def test_steps_of_one_generation_build_on_each_other() -> None:
    """A prompt and two single tokens, on the same caches, are one prompt."""
    whole = Call(starts=(0,), sequence=6, capacity=8, cache="int8", packed=True, norm=True)
    inputs = Inputs.random(whole, torch.float16)
    made = session(attention_model(whole, "float16"))
    at_once = tensors_of(whole, inputs)
    steps = {name: tensor.clone() for name, tensor in at_once.items()}
    expected = torch.empty((1, 6, 256), dtype=torch.float16, device=at_once["query"].device)
    run_in_place(made, at_once, expected)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        one = {**steps, "cache_position": torch.full_like(steps["cache_position"], start)}
        one |= {name: steps[name][:, start:end].clone() for name in ("query", "position_ids")}
        found = torch.empty_like(expected[:, start:end])
        run_in_place(made, one, found)
        difference = (found.double() - expected[:, start:end].double()).abs().max()
        assert float(difference) < DTYPES["float16"][1] * float(expected.abs().max())
    for name in CACHE_NAMES:
        assert torch.equal(steps[name][:, :, :6], at_once[name][:, :, :6])
