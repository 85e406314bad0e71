"""Residual addition and norm in one node: positive, numeric, negative."""

from __future__ import annotations

import numpy as np
import pytest

from qwenforge.graph_passes.lower.ort_skip_norm import FuseResidualNorm
from support.small_graphs import answers, apply_rule, graph_from_text, normal, ops, relative_error
from support.tolerances import FLOAT16, FLOAT32_EXACT

FUSED = "SkipSimplifiedLayerNormalization"


@pytest.mark.parametrize(("kind", "bound"), [("float", FLOAT32_EXACT), ("float16", FLOAT16)])
def test_sum_and_norm_become_one_node_with_both_results(kind: str, bound: float) -> None:
    dtype = np.float32 if kind == "float" else np.float16
    scale = normal(48, seed=1, dtype=dtype)
    text = f"""({kind}[B,S,48] a, {kind}[B,S,48] b) => ({kind}[B,S,48] y, {kind}[B,S,48] after)
        {{ s = Add(a, b)  y = RMSNormalization<axis = -1, epsilon = 1e-6>(s, w)  after = Mul(s, s) }}"""
    feeds = {name: normal(2, 5, 48, seed=seed, dtype=dtype) for seed, name in enumerate("ab")}
    expected = answers(graph_from_text(text, w=scale), **feeds)
    model = graph_from_text(text, w=scale)
    assert apply_rule(FuseResidualNorm(), model).matches == 1
    assert ops(model) == [FUSED, "Mul"] and model.graph[0].name == "y"
    for found, wanted in zip(answers(model, **feeds), expected, strict=True):
        assert relative_error(found, wanted) < bound


def test_sum_that_is_an_output_stays_one() -> None:
    text = """(float[B,S,8] a, float[B,S,8] b) => (float[B,S,8] y, float[B,S,8] s)
        { s = Add(a, b)  y = RMSNormalization<axis = 2, epsilon = 1e-6>(s, w) }"""
    model = graph_from_text(text, w=normal(8))
    assert apply_rule(FuseResidualNorm(), model).matches == 1
    assert [value.name for value in model.graph.outputs] == ["y", "s"] and ops(model) == [FUSED]
    a, b = normal(1, 3, 8, seed=1), normal(1, 3, 8, seed=2)
    assert np.array_equal(answers(model, a=a, b=b)[1], a + b)


def test_norm_without_epsilon_uses_the_operators_default() -> None:
    text = "(float[1,2,8] a, float[1,2,8] b) => (float[1,2,8] y) { s = Add(a, b)  y = RMSNormalization(s, w) }"
    feeds = {"a": normal(1, 2, 8, seed=1, scale=1e-3), "b": normal(1, 2, 8, seed=2, scale=1e-3)}
    expected = answers(graph_from_text(text, w=normal(8)), **feeds)[0]
    model = graph_from_text(text, w=normal(8))
    assert apply_rule(FuseResidualNorm(), model).matches == 1
    assert relative_error(answers(model, **feeds)[0], expected) < FLOAT32_EXACT


NEGATIVE = {
    "a bias is added": (
        "(float[B,S,8] a) => (float[B,S,8] y) { s = Add(a, c)  y = RMSNormalization<axis = -1>(s, w) }",
        "a constant is added",
    ),
    "a row is broadcast": (
        "(float[B,S,8] a, float[1,S,8] b) => (float[B,S,8] y) { s = Add(a, b)  y = RMSNormalization<axis = -1>(s, w) }",
        "the sum before the norm broadcasts",
    ),
    "a number for each token is broadcast": (
        "(float[B,S,8] a, float[B,S,1] b) => (float[B,S,8] y) { s = Add(a, b)  y = RMSNormalization<axis = -1>(s, w) }",
        "the sum before the norm broadcasts",
    ),
    "the rank is 2": (
        "(float[T,8] a, float[T,8] b) => (float[T,8] y) { s = Add(a, b)  y = RMSNormalization<axis = -1>(s, w) }",
        "the sum before the norm broadcasts",
    ),
    "the norm spans two axes": (
        "(float[B,2,8] a, float[B,2,8] b) => (float[B,2,8] y) { s = Add(a, b)  y = RMSNormalization<axis = 1>(s, w) }",
        "not over the last axis",
    ),
    "the norm computes in half precision": (
        "(float16[B,S,8] a, float16[B,S,8] b) => (float16[B,S,8] y)"
        " { s = Add(a, b)  y = RMSNormalization<axis = -1, stash_type = 10>(s, h) }",
        "does not compute in fp32",
    ),
    "the scale is computed behind the sum": (
        "(float[B,S,8] a, float[B,S,8] b) => (float[B,S,8] y)"
        " { s = Add(a, b)  v = Mul(w, w)  y = RMSNormalization<axis = -1>(s, v) }",
        "the norm's scale is computed",
    ),
}


@pytest.mark.parametrize("case", NEGATIVE)
def test_look_alike_is_left_alone(case: str) -> None:
    text, reason = NEGATIVE[case]
    used = {"w": normal(8), "h": normal(8, dtype=np.float16), "c": normal(8)}
    model = graph_from_text(text, **{name: used[name] for name in used if f", {name})" in text or f"({name}," in text})
    before = ops(model)
    rule = apply_rule(FuseResidualNorm(), model)
    assert rule.matches == 0 and reason in rule.failures[0] and ops(model) == before


def test_norm_of_something_else_is_no_look_alike() -> None:
    model = graph_from_text(
        "(float[B,S,8] a) => (float[B,S,8] y) { s = Mul(a, a)  y = RMSNormalization<axis = -1>(s, w) }", w=normal(8)
    )
    rule = apply_rule(FuseResidualNorm(), model)
    assert rule.matches == 0 and not rule.failures
