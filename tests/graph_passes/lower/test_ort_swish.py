"""Swish as ``com.microsoft::QuickGelu``."""

from __future__ import annotations

import numpy as np
import pytest

from qwenforge.graph_passes.lower.ort_swish import SwishToQuickGelu
from support.small_graphs import answers, apply_rule, graph_from_text, ops
from support.tolerances import FLOAT16, FLOAT32_EXACT


@pytest.mark.parametrize("attribute", ["", "<alpha = 1.5>"])
@pytest.mark.parametrize(("kind", "bound"), [("float", FLOAT32_EXACT), ("float16", FLOAT16)])
def test_kernel_answers_as_swish_over_the_whole_range(kind: str, bound: float, attribute: str) -> None:
    text = f"({kind}[N] x) => ({kind}[N] y) {{ y = Swish{attribute}(x) }}"
    dtype = np.float32 if kind == "float" else np.float16
    x = np.concatenate([np.linspace(-30, 30, 401), [0.0, -1e4, 1e4]]).astype(dtype)
    expected = answers(graph_from_text(text), x=x)[0].astype(np.float64)
    model = graph_from_text(text)
    rule = apply_rule(SwishToQuickGelu(), model)
    assert rule.matches == 1 and ops(model) == ["QuickGelu"] and model.graph[0].name == "y"
    assert np.all(np.abs(answers(model, x=x)[0] - expected) <= bound * np.maximum(1, np.abs(expected)))


def test_swish_of_another_domain_is_left_alone() -> None:
    model = graph_from_text("(float[N] x) => (float[N] y) { y = Swish(x) }")
    model.graph[0].domain = "elsewhere"
    rule = apply_rule(SwishToQuickGelu(), model)
    assert rule.matches == 0 and ops(model) == ["Swish"]
