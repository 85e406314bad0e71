"""QwenForgeMoE in real ONNX Runtime sessions, its kernels emulated: against float64, and every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwenforge.plugins.moe.packing import WeightType
from support import simt
from support.moe_cases import Case, Weights, error, feeds, reference
from support.ort_custom_op import SPEC, moe_model, session

pytestmark = pytest.mark.skipif(bool(simt.why_missing()), reason=simt.why_missing() or "-")

CASES = {
    "plain": Case(),
    "bfloat16": Case(dtype="bfloat16", top_k=3),
    "shared experts": Case(shared=2, normalize=True),
    "three local experts of six": Case(first_local=2, local=3, shared=1),
    "odd sizes": Case(hidden=72, width=24, top_k=4),
    "int8": Case(weights=WeightType.INT8),
    "int8, shared, bfloat16": Case(weights=WeightType.INT8, shared=1, dtype="bfloat16"),
    "int4": Case(weights=WeightType.INT4, group_size=64, hidden=128, normalize=True),
    "fp8, shared": Case(weights=WeightType.FLOAT8, shared=1),
}


@pytest.mark.parametrize("name", CASES)
def test_session_agrees_with_float64_for_any_number_of_tokens(name: str) -> None:
    case = CASES[name]
    weights = Weights.random(case, seed=len(name))
    made = session(moe_model(case.attributes, weights.tensors, case.dtype))
    for tokens in (5, 1, 70):
        given = feeds(case, tokens)
        (found,) = made.run(None, given)
        assert error(found, reference(case, weights, given)) < case.tolerance
    assert made.run(None, feeds(case, 0))[0].shape == (0, case.hidden)


def test_output_has_the_type_and_the_shape_of_the_tokens() -> None:
    """Before the kernel runs: nodes behind it are typed and planned with them."""
    case = Case(dtype="bfloat16", shared=1)
    tensors = Weights.random(case).tensors
    for tokens in ("T", 7):
        made = session(moe_model(case.attributes, tensors, case.dtype, tokens=tokens))
        assert made.get_outputs()[0].shape == [tokens, case.hidden]


def test_sessions_share_what_is_registered() -> None:
    case = Case()
    model = moe_model(case.attributes, Weights.random(case).tensors, case.dtype)
    first, second = session(model), session(model)
    given = feeds(case, 3)
    expected = first.run(None, given)[0]
    del first
    assert np.array_equal(second.run(None, given)[0], expected)


def _refusal(
    case: Case, attributes: dict[str, Any], tensors: dict[str, np.ndarray], casts: dict[str, str] | None = None
) -> str:
    """What ONNX Runtime says of the node when the session is made."""
    with pytest.raises(Exception, match="QwenForgeMoE") as caught:
        session(moe_model(attributes, tensors, case.dtype, casts=casts))
    assert type(caught.value).__module__.startswith("onnxruntime")
    return str(caught.value)


ATTRIBUTES: dict[str, tuple[dict[str, Any], str]] = {
    "above": ({"top_k": 9}, "top_k is 9, above 8 (routed experts of a token)"),
    "below": ({"normalize_topk": -1}, "normalize_topk is -1, below 0"),
    "no multiple": ({"hidden_size": 60}, "hidden_size is 60, no multiple of 8"),
    "not 32 bits": ({"top_k": 2**40}, "top_k is 1099511627776, which is no number of 32 bits"),
    "a float": ({"top_k": 2.0}, "attribute top_k is missing, or is no integer"),
    "a text": ({"layout_version": "1"}, "attribute layout_version is missing, or is no integer"),
    "another layout": ({"layout_version": 2}, "layout_version is 2, above 1 (of the packed weights)"),
    "requirement": ({"top_k": 7}, "top_k is larger than num_experts"),
    "requirement of packed weights": (
        {"weight_type": 2, "group_size": 256},
        "INT4 weights need a group_size of 64 or 128",
    ),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_wrong_attribute_is_refused_in_a_sentence(name: str) -> None:
    change, sentence = ATTRIBUTES[name]
    case = Case()
    assert f"QwenForgeMoE 'layer 3': {sentence}" in _refusal(
        case, {**case.attributes, **change}, Weights.random(case).tensors
    )


@pytest.mark.parametrize("attribute", [attribute.name for attribute in SPEC.attributes])
def test_missing_attribute_is_named(attribute: str) -> None:
    case = Case()
    model = moe_model(case.attributes, Weights.random(case).tensors, case.dtype)
    (node,) = (node for node in model.graph.node if node.op_type == SPEC.name)
    kept = [item for item in node.attribute if item.name != attribute]
    assert len(kept) == len(node.attribute) - 1
    del node.attribute[:]
    node.attribute.extend(kept)
    with pytest.raises(Exception, match=f"QwenForgeMoE 'layer 3': attribute {attribute} is missing"):
        session(model)


TENSORS: dict[str, tuple[Case, dict[str, np.ndarray | None], str]] = {
    "another width": (
        Case(),
        {"gate_up_weights": np.zeros((6, 100, 64), np.float16)},
        "dimension 1 of gate_up_weights is 100, but 2 * intermediate_size is 128",
    ),
    "too few experts": (
        Case(shared=1),
        {"down_weights": np.zeros((6, 64, 64), np.float16)},
        "dimension 0 of down_weights is 6, but num_local_experts + num_shared_experts is 7",
    ),
    "rank": (Case(), {"down_weights": np.zeros((64, 64), np.float16)}, "down_weights has 2 dimensions, not 3"),
    "other type of weights": (
        Case(),
        {"down_weights": np.zeros((6, 64, 64), np.float32)},
        "down_weights is of type float32, but hidden_states of type float16",
    ),
    "weights that are not packed": (
        Case(weights=WeightType.INT8),
        {"gate_up_weights": np.zeros((6, 128, 64), np.float16)},
        "gate_up_weights is of type float16, not int8",
    ),
    "scales of another type": (
        Case(weights=WeightType.INT8),
        {"down_scales": np.zeros((6, 1, 64), np.float16)},
        "down_scales is of type float16, not float32",
    ),
    "no scales": (
        Case(weights=WeightType.INT8),
        {"gate_up_scales": None},
        "input gate_up_scales is missing, which the attributes ask for",
    ),
    "no last scales": (
        Case(weights=WeightType.FLOAT8),
        {"activation_scales": None},
        "input activation_scales is missing, which the attributes ask for",
    ),
    "scales of no use": (
        Case(),
        {"gate_up_scales": np.zeros((6, 1, 128), np.float16)},
        "input gate_up_scales is given, for which the attributes have no use",
    ),
    "gates of no use": (
        Case(),
        {"shared_gate_logits": np.zeros((5, 1), np.float16)},
        "input shared_gate_logits is given, for which the attributes have no use",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensor_is_refused_in_a_sentence(name: str) -> None:
    case, changes, sentence = TENSORS[name]
    changed = {**Weights.random(case).tensors, **changes}
    tensors = {key: value for key, value in changed.items() if value is not None}
    assert f"QwenForgeMoE 'layer 3': {sentence}" in _refusal(case, case.attributes, tensors)


def test_tokens_of_another_type_are_refused() -> None:
    case = Case()
    tensors = Weights.random(case).tensors
    mixed = _refusal(case, case.attributes, tensors, casts={"router_logits": "bfloat16"})
    assert "QwenForgeMoE 'layer 3': router_logits is of type bfloat16, but hidden_states of type float16" in mixed
    # ONNX Runtime's own words: it knows the types that the first input may have.
    single = _refusal(case, case.attributes, tensors, casts={"hidden_states": "float32"})
    assert "Type 'tensor(float)' of input parameter (hidden_states) of operator (QwenForgeMoE)" in single


def test_disagreeing_numbers_of_tokens_are_refused_at_the_call() -> None:
    case = Case()
    made = session(moe_model(case.attributes, Weights.random(case).tensors, case.dtype))
    given = {**feeds(case, 4), "router_logits_float": feeds(case, 3)["router_logits_float"]}
    with pytest.raises(Exception, match="dimension 0 of router_logits is 3, but tokens of hidden_states is 4"):
        made.run(None, given)
    assert made.run(None, feeds(case, 4))[0].shape == (4, case.hidden)
