"""Only the tokens that ``logits_index`` names are projected onto the vocabulary; other ends of a graph stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.graph_passes.fuse.logits import SelectLogits
from qwenforge.graph_passes.infra import RULE_TAG
from support.small_graphs import Array, answers, apply_rule, graph_from_text, normal, ops, relative_error
from support.tolerances import FLOAT16, FLOAT32_REORDERED

VOCABULARY, HIDDEN = 12, 8
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
PLAIN = "logits = MatMul(x, head)"


def _model(nodes: str = PLAIN, logits: str = f"float[B,S,{VOCABULARY}]", tokens: str = "B,S", **given: Any) -> ir.Model:
    """A model of embeddings whose caches are the embeddings; ``nodes`` lead from them, ``x``, to the logits."""
    body = f"""heads = Constant<value_ints = [0, 0, 2, 4]>()  last = Constant<value_ints = [-1]>()
      second = Constant<value_ints = [1]>()  far = Constant<value_ints = [{2**63 - 1}]>()
      x = Gather(embedding, input_ids)  flat = Reshape(x, heads)
      present_key_0 = Transpose<perm = [0, 2, 1, 3]>(flat)  present_value_0 = Identity(present_key_0)  {nodes}"""
    weights = {"embedding": normal(16, HIDDEN), "head": normal(HIDDEN, VOCABULARY), "bias": normal(VOCABULARY), **given}
    used = {name: array for name, array in weights.items() if f", {name})" in body or f"({name}," in body}
    caches = "float[B,2,S,4] present_key_0, float[B,2,S,4] present_value_0".replace("B,2,S", tokens.replace(",", ",2,"))
    return graph_from_text(f"(int64[{tokens}] input_ids) => ({logits} logits, {caches}) {{ {body} }}", **used)


def _expected(rows: Array) -> Array:
    """fp64 logits [B, N, V] of the tokens ``rows`` [B, N]."""
    wide = normal(16, HIDDEN).astype(np.float64)[np.take_along_axis(TOKENS, rows, 1)]
    result: Array = wide @ normal(HIDDEN, VOCABULARY).astype(np.float64)
    return result


CHOICES = {
    "the last of each row": np.array([[4], [4]]),
    "rows of unequal lengths": np.array([[2], [4]]),
    "all": np.tile(np.arange(5), (2, 1)),
    "some, in no order and twice": np.array([[3, 0, 3], [1, 1, 4]]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_chosen_tokens_are_projected(choice: str) -> None:
    rows, model = CHOICES[choice], _model()
    rule = apply_rule(SelectLogits(), model)
    assert rule.matches == 1 and rule.failures == []
    assert ops(model)[-3:] == ["Unsqueeze", "GatherND", "MatMul"]
    index = model.graph.inputs[-1]
    assert index.name == "logits_index" and index.dtype == ir.DataType.INT64
    assert str(index.shape) == "[batch,logits_count]"
    assert str(model.graph.outputs[0].shape) == f"[batch,logits_count,{VOCABULARY}]"
    tagged = [node.op_type for node in model.graph if node.metadata_props.get(RULE_TAG) == "select_logits"]
    assert tagged == ["Unsqueeze", "GatherND"]
    logits = answers(model, input_ids=TOKENS, logits_index=rows)[0]
    assert logits.shape == (*rows.shape, VOCABULARY)
    assert relative_error(logits, _expected(rows)) <= FLOAT32_REORDERED


def test_other_outputs_still_have_every_token() -> None:
    before, model = _model(), _model()
    apply_rule(SelectLogits(), model)
    expected = answers(before, input_ids=TOKENS)[1:]
    found = answers(model, input_ids=TOKENS, logits_index=np.zeros((2, 1), np.int64))[1:]
    assert all(np.array_equal(new, old) for new, old in zip(found, expected, strict=True))


HALF_PRECISION = {
    "logits in fp16": ("half = Cast<to = 10>(x)  logits = MatMul(half, head16)", "float16"),
    "logits cast to fp32": (
        "half = Cast<to = 10>(x)  product = MatMul(half, head16)  logits = Cast<to = 1>(product)",
        "float",
    ),
}


@pytest.mark.parametrize("form", HALF_PRECISION)
def test_half_precision_logits_leave_in_fp32(form: str) -> None:
    nodes, kind = HALF_PRECISION[form]
    head = normal(HIDDEN, VOCABULARY).astype(np.float16)
    model = _model(nodes, f"{kind}[B,S,{VOCABULARY}]", head16=head)
    assert apply_rule(SelectLogits(), model).matches == 1
    assert ops(model)[-4:] == ["Unsqueeze", "GatherND", "MatMul", "Cast"] and ops(model).count("Cast") == 2
    logits, rows = model.graph.outputs[0], CHOICES["rows of unequal lengths"]
    assert logits.name == "logits" and logits.dtype == ir.DataType.FLOAT
    found = answers(model, input_ids=TOKENS, logits_index=rows)[0]
    assert found.dtype == np.float32 and relative_error(found, _expected(rows)) <= FLOAT16


def test_embedding_used_again_as_the_projection() -> None:
    """A tied vocabulary whose transposition nobody folded."""
    model = _model("turned = Transpose(embedding)  logits = MatMul(x, turned)", "float[B,S,16]")
    assert apply_rule(SelectLogits(), model).matches == 1
    rows = CHOICES["all"]
    embedding = normal(16, HIDDEN).astype(np.float64)
    found = answers(model, input_ids=TOKENS, logits_index=rows)[0]
    assert relative_error(found, embedding[TOKENS] @ embedding.T) <= FLOAT32_REORDERED


def test_graph_of_fixed_sizes_keeps_them_as_its_tokens() -> None:
    model = _model(logits=f"float[2,5,{VOCABULARY}]", tokens="2,5")
    assert apply_rule(SelectLogits(), model).matches == 1
    rows = CHOICES["rows of unequal lengths"]
    found = answers(model, input_ids=TOKENS, logits_index=rows)[0]
    assert relative_error(found, _expected(rows)) <= FLOAT32_REORDERED


def test_graph_that_chooses_already_is_left_as_it_is() -> None:
    model = _model()
    apply_rule(SelectLogits(), model)
    before = ops(model)
    again = apply_rule(SelectLogits(), model)
    assert again.matches == 0 and again.failures == [] and ops(model) == before


NO_PRODUCT = "the logits are not the product of a [batch, sequence, hidden] tensor and a matrix"
NOT_EVERY = "not every token of the input is projected onto the vocabulary, or in another order"
SOME = f"float[B,N,{VOCABULARY}]"
LOOK_ALIKES: dict[str, tuple[str, str | None, str]] = {
    "the last token, cut before": ("end = Slice(x, last, far, second)  logits = MatMul(end, head)", SOME, NOT_EVERY),
    "the last token, cut before the norm": (
        "end = Slice(x, last, far, second)  normed = Relu(end)  logits = MatMul(normed, head)",
        SOME,
        NOT_EVERY,
    ),
    "the last token, gathered": ("end = Gather<axis = 1>(x, last)  logits = MatMul(end, head)", SOME, NOT_EVERY),
    "the last token of the logits": (
        f"all = {PLAIN.split('= ')[1]}  logits = Slice(all, last, far, second)",
        SOME,
        NO_PRODUCT,
    ),
    "no axis of tokens": (
        "end = Gather<axis = 1>(x, zero)  logits = MatMul(end, head)",
        f"float[B,{VOCABULARY}]",
        NO_PRODUCT,
    ),
    "tokens and batch exchanged": (
        "turned = Transpose<perm = [1, 0, 2]>(x)  logits = MatMul(turned, head)",
        f"float[S,B,{VOCABULARY}]",
        NOT_EVERY,
    ),
    "a bias": ("product = MatMul(x, head)  logits = Add(product, bias)", None, NO_PRODUCT),
    "log-probabilities": ("product = MatMul(x, head)  logits = LogSoftmax(product)", None, NO_PRODUCT),
    "scores between the tokens": (
        "turned = Transpose<perm = [0, 2, 1]>(x)  logits = MatMul(x, turned)",
        "float[B,S,S]",
        NO_PRODUCT,
    ),
    "a matrix for each row": ("logits = MatMul(x, heads_of_rows)", None, NO_PRODUCT),
    "a layout that nobody knows": ("same = Reshape(x, anything)  logits = MatMul(same, head)", None, NOT_EVERY),
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alike_stays_and_is_told(case: str) -> None:
    nodes, logits, reason = LOOK_ALIKES[case]
    given = {
        "zero": np.array(0),
        "anything": np.array([0, -1, HIDDEN]),
        "heads_of_rows": normal(2, HIDDEN, VOCABULARY),
    }
    model = _model(nodes, *([] if logits is None else [logits]), **given)
    before, shape = ops(model), str(model.graph.outputs[0].shape)
    rule = SelectLogits()
    rule(model)
    assert rule.matches == 0 and ops(model) == before and str(model.graph.outputs[0].shape) == shape
    assert [value.name for value in model.graph.inputs] == ["input_ids"]
    assert len(rule.failures) == 1 and rule.failures[0].startswith(reason), rule.failures
