"""The choice of tokens behind the last layer's attention: where it stands, that answers stay, what keeps it back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import names
from qwenforge.graph_passes.infra import is_op
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.lower.early_tokens import ChooseTokensEarly
from qwenforge.graph_passes.lower.ort_cpu import ort_cpu_rules
from support.cached_decoder import load_session
from support.checkpoints import Kind
from support.portable_models import portable_model, random_model
from support.small_graphs import Array, answers, apply_rule, graph_from_text, normal, ops, relative_error
from support.tolerances import FLOAT32_EXACT, FLOAT32_REORDERED

KINDS: tuple[Kind, ...] = ("qwen2", "qwen2_moe")
LAYERS, CAPACITY = 2, 8
LENGTHS = (5, 3, 1)
INDEX = {
    "the last token of each row": np.array([[4], [2], [0]]),
    "every token": np.tile(np.arange(5), (3, 1)),
    "two, not in order, one twice": np.array([[4, 1], [2, 2], [0, 0]]),
}


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest) -> Any:
    """A dense model, and one of experts with a shared expert."""
    return random_model(request.param, num_hidden_layers=LAYERS)


def _run(model: ir.Model, index: Array) -> list[Array]:
    """Outputs for rows of ``LENGTHS`` tokens, padded on the right, over empty caches; the caches left out."""
    session = load_session(model)
    tokens = np.random.default_rng(0).integers(0, 250, (len(LENGTHS), max(LENGTHS)))
    tokens[np.arange(max(LENGTHS)) >= np.array(LENGTHS)[:, None]] = 5
    feeds: dict[str, Array] = {
        names.INPUT_IDS: tokens,
        names.POSITION_IDS: np.tile(np.arange(max(LENGTHS)), (len(LENGTHS), 1)),
        names.CACHE_POSITION: np.zeros(len(LENGTHS), np.int64),
        names.LOGITS_INDEX: index,
    }
    for value in session.get_inputs():
        if value.name not in feeds:
            feeds[value.name] = np.zeros((len(LENGTHS), value.shape[1], CAPACITY, value.shape[3]), np.float32)
    wanted = [value.name for value in session.get_outputs() if not value.name.startswith("present.")]
    return list(session.run(wanted, feeds))


def _lowered_without(model: ir.Model) -> ir.Model:
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

    for rule in ort_cpu_rules():
        if not isinstance(rule, ChooseTokensEarly):
            rule(model)
            RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return model


def _choices(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "GatherND"]


@pytest.mark.parametrize("tokens", INDEX)
def test_lowered_logits_are_those_of_tokens_chosen_late(source: Any, tokens: str) -> None:
    early, late = lower(portable_model(source), "ort-cpu"), _lowered_without(portable_model(source))
    assert len(_choices(early)) == 2 and len(_choices(late)) == 1
    (found,), (expected,) = _run(early, INDEX[tokens]), _run(late, INDEX[tokens])
    assert found.shape == (*INDEX[tokens].shape, source.config.vocab_size)
    assert relative_error(found, expected) < FLOAT32_REORDERED


def test_tokens_are_chosen_of_the_last_attention_and_of_its_residual(source: Any) -> None:
    model = portable_model(source)
    assert apply_rule(ChooseTokensEarly(), model).matches == 1
    producers = [node.inputs[0].producer() for node in _choices(model) if node.inputs[0] is not None]
    last = LAYERS - 1
    assert sorted(node.name or "" for node in producers if node is not None) == [
        f"model.layers.{last - 1}.mlp_residual",
        f"model.layers.{last}.self_attn.attention",
    ]


@pytest.mark.parametrize("tokens", INDEX)
def test_everything_behind_the_last_attention_sees_chosen_tokens_only(source: Any, tokens: str) -> None:
    """Seen at run time: the results of all nodes there, the experts' rows among them, become outputs."""
    model = portable_model(source)
    apply_rule(ChooseTokensEarly(), model)
    nodes = list(model.graph)
    attention = next(node for node in nodes if node.name == f"model.layers.{LAYERS - 1}.self_attn.attention")
    watched = [
        output
        for node in nodes[nodes.index(attention) + 1 :]
        if node.op_type not in ("Unsqueeze", "Shape", "Concat") and not node.outputs[0].is_graph_output()
        for output in node.outputs
    ]
    products = {value.producer().op_type for value in watched if value.producer() is not None}  # type: ignore[union-attr]
    assert "MatMul" in products and ("MixtureOfExperts" in products) == (source.config.model_type == "qwen2_moe")
    for value in watched:
        assert value.shape is not None
        channels = value.shape[-1]
        value.shape = ir.Shape([*[None] * (len(value.shape) - 1), channels])
    model.graph.outputs.extend(watched)
    batch, count = INDEX[tokens].shape
    for value, found in zip(watched, _run(model, INDEX[tokens])[1:], strict=True):
        assert found.shape[:-1] in ((batch, count), (batch * count,)), f"{value.name} {found.shape}"


def test_rule_has_nothing_left_to_do_the_second_time(source: Any) -> None:
    model = portable_model(source)
    apply_rule(ChooseTokensEarly(), model)
    before = ops(model)
    assert apply_rule(ChooseTokensEarly(), model).matches == 0 and ops(model) == before


SIGNATURE = "(float[B,S,8] x, int64[B,N] logits_index)"
CHOSEN = "i = Unsqueeze(logits_index, axis)  c = GatherND<batch_dims = 1>(y, i)  logits = MatMul(c, v)"
LOGITS = "float[B,N,6] logits"


def _small(body: str, *, outputs: str = LOGITS) -> ir.Model:
    """``body`` makes y [B,S,8] of x; tokens of y are chosen and projected onto a vocabulary of 6."""
    constants: dict[str, Array] = {"v": normal(8, 6, seed=2), "axis": np.array([-1])}
    if "w)" in body:
        constants["w"] = normal(8, 8, seed=1)
    return graph_from_text(f"{SIGNATURE} => ({outputs}) {{ {body}  {CHOSEN} }}", **constants)


def _small_answers(model: ir.Model) -> list[Array]:
    return answers(model, x=normal(3, 4, 8), logits_index=np.array([[3, 0], [1, 1], [0, 2]]))


def test_softmax_over_channels_moves_behind_the_choice() -> None:
    """What the look-alikes below differ from."""
    body = "h = MatMul(x, w)  y = Softmax<axis = -1>(h)"
    model = _small(body)
    assert apply_rule(ChooseTokensEarly(), model).matches == 1
    assert ops(model) == ["Unsqueeze", "GatherND", "MatMul", "Softmax", "MatMul"]
    assert relative_error(_small_answers(model)[0], _small_answers(_small(body))[0]) < FLOAT32_EXACT


NO_PRODUCT = "no product lies between what mixes tokens and their choice"
LOOK_ALIKES = {
    "softmax over tokens": ("h = MatMul(x, w)  y = Softmax<axis = 1>(h)", LOGITS, NO_PRODUCT),
    "a factor computed of all tokens": (
        "h = MatMul(x, w)  axes = Constant<value_ints = [0, 1]>()  m = ReduceMax<keepdims = 0>(x, axes)  y = Mul(h, m)",
        LOGITS,
        NO_PRODUCT,
    ),
    "hidden states that are an output too": ("y = MatMul(x, w)", f"{LOGITS}, float[B,S,8] y", NO_PRODUCT),
    "an input of theirs that is an output too": (
        "h = MatMul(x, w)  y = Sigmoid(h)",
        f"{LOGITS}, float[B,S,8] h",
        NO_PRODUCT,
    ),
    "hidden states with another reader": (
        "y = MatMul(x, w)  axes = Constant<value_ints = [0, 1]>()  m = ReduceMax<keepdims = 0>(y, axes)",
        f"{LOGITS}, float[8] m",
        NO_PRODUCT,
    ),
    "a scale a token, of rank 1": (
        "rows = Constant<value_ints = [-1, 8]>()  f = Reshape(x, rows)"
        "  axes = Constant<value_ints = [1]>()  m = ReduceMax<keepdims = 0>(f, axes)"
        "  q = QuantizeLinear<axis = 0, output_dtype = 3>(f, m)  d = DequantizeLinear<axis = 0>(q, m)"
        "  p = MatMul(d, w)  three = Constant<value_ints = [3, -1, 8]>()  y = Reshape(p, three)",
        LOGITS,
        "d is no [batch, sequence, channels] tensor",
    ),
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_tokens_are_chosen_late_where_there_is(case: str) -> None:
    body, outputs, reason = LOOK_ALIKES[case]
    model = _small(body, outputs=outputs)
    before = ops(model)
    rule = apply_rule(ChooseTokensEarly(), model)
    assert rule.matches == 0 and ops(model) == before
    assert len(rule.failures) == 1 and reason in rule.failures[0]


def test_product_behind_a_softmax_over_tokens_moves_alone() -> None:
    """The choice stops behind the softmax, which goes on to see every token."""
    body = "h = MatMul(x, w)  s = Softmax<axis = 1>(h)  y = MatMul(s, w)"
    model = _small(body)
    assert apply_rule(ChooseTokensEarly(), model).matches == 1
    assert is_op(_choices(model)[0].inputs[0], "Softmax") is not None
    assert relative_error(_small_answers(model)[0], _small_answers(_small(body))[0]) < FLOAT32_EXACT


def test_choice_by_another_input_than_logits_index_is_left_alone() -> None:
    model = _small("y = MatMul(x, w)")
    next(value for value in model.graph.inputs if value.name == names.LOGITS_INDEX).name = "tokens"
    rule = apply_rule(ChooseTokensEarly(), model)
    assert rule.matches == 0 and not rule.failures


def test_hidden_states_of_unknown_shape_are_reported() -> None:
    model = _small("y = MatMul(x, w)")
    model.graph.node("y").outputs[0].shape = None
    rule = apply_rule(ChooseTokensEarly(), model)
    assert rule.matches == 0 and rule.failures == ["the shape of y is not known (at node c)"]
