"""Superfluous Reshapes: dropped, skipped and merged; those that might do something stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.graph_passes.fuse.reshapes import SimplifyReshapes
from support.small_graphs import answers, apply_rule, graph_from_text, normal, ops

SIGNATURE = "(float[B,S,8] x) => (float[M,N] y, float[K,L] z)"
CASES = {
    "a flat tensor is flattened": ("a = Reshape(x, flat)  b = Reshape(a, flat)  y = Relu(a)  z = Relu(b)", 1),
    "three in a row": (
        "a = Reshape(x, quads)  b = Reshape(a, pairs)  c = Reshape(b, flat)  y = Relu(c)  z = Relu(c)",
        2,
    ),
    "equal ones": ("a = Reshape(x, flat)  b = Reshape(x, flat)  y = Relu(a)  z = Neg(b)", 1),
    "equal ones, one by a detour": (
        "a = Reshape(x, flat)  b = Reshape(x, pairs)  c = Reshape(b, flat)  y = Relu(a)  z = Neg(c)",
        2,
    ),
    "zero that no allowzero makes a length": (
        "a = Reshape<allowzero = 1>(x, flat)  b = Reshape<allowzero = 1>(a, flat)  y = Relu(b)  z = Neg(b)",
        1,
    ),
    "copied dimensions": ("a = Reshape(x, copied)  b = Relu(a)  y = Reshape(b, flat)  z = Reshape(b, pairs)", 1),
}
SHAPES = {
    "flat": [-1, 8],
    "pairs": [-1, 2],
    "quads": [2, -1, 4],
    "copied": [0, -1, 8],
    "rows": [0, 2, -1],
    "one": [-1, 1],
    "line": [-1],
    "empty": [0, 0],
}


def _model(nodes: str, signature: str = SIGNATURE) -> ir.Model:
    used = {name: np.array(shape) for name, shape in SHAPES.items() if f", {name})" in nodes}
    return graph_from_text(f"{signature} {{ {nodes} }}", **used)


@pytest.mark.parametrize("case", CASES)
def test_superfluous_reshape_is_gone_and_nothing_else_changes(case: str) -> None:
    nodes, removed = CASES[case]
    x = normal(2, 3, 8)
    expected = answers(_model(nodes), x=x)
    model = _model(nodes)
    before = len(ops(model))
    rule = apply_rule(SimplifyReshapes(), model)
    assert rule.matches == removed and len(ops(model)) == before - removed
    for found, wanted in zip(answers(model, x=x), expected, strict=True):
        assert np.array_equal(found, wanted)


KEPT = {
    "other shapes": "a = Reshape(x, flat)  b = Reshape(x, pairs)  y = Relu(a)  z = Relu(b)",
    "as many dimensions": "a = Reshape(x, flat)  c = Abs(a)  b = Reshape(c, pairs)  y = Relu(a)  z = Relu(b)",
    "fewer dimensions": "a = Relu(x)  b = Reshape(a, line)  y = Reshape(a, flat)  c = Relu(b)  z = Reshape(c, pairs)",
    "a dimension copied from the one in front": (
        "a = Reshape(x, pairs)  b = Reshape(a, rows)  y = Neg(a) s = Shape(b)  c = Cast<to = 1>(s)  z = Reshape(c, one)"
    ),
    "a computed shape": "a = Reshape(x, flat)  s = Shape(a)  b = Reshape(a, s)  y = Relu(a)  z = Relu(b)",
}


@pytest.mark.parametrize("case", KEPT)
def test_reshape_that_may_do_something_stays(case: str) -> None:
    x = normal(2, 3, 8)
    expected = answers(_model(KEPT[case]), x=x)
    model = _model(KEPT[case])
    before = ops(model)
    assert apply_rule(SimplifyReshapes(), model).matches == 0 and ops(model) == before
    for found, wanted in zip(answers(model, x=x), expected, strict=True):
        assert np.array_equal(found, wanted)


def test_reshape_to_an_empty_tensor_is_no_copy_of_a_dimension() -> None:
    """With allowzero a zero is a length."""
    signature = "(float[3,N] x) => (float[0,0] y, float[3,N] z)"
    model = _model("a = Reshape<allowzero = 1>(x, empty)  y = Relu(a)  z = Relu(x)", signature)
    assert apply_rule(SimplifyReshapes(), model).matches == 0
    assert answers(model, x=np.zeros((3, 0), np.float32))[0].shape == (0, 0)


def test_tensor_of_an_unknown_shape_is_reshaped_still() -> None:
    signature = "(float[B,8] x) => (float[M,N] y, float[K,L] z)"
    model = _model("a = Relu(x)  b = Reshape(a, flat)  y = Relu(b)  z = Relu(b)", signature)
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        value.shape = None
    assert apply_rule(SimplifyReshapes(), model).matches == 0


def test_reshape_that_gives_an_output_its_name_stays() -> None:
    model = _model("a = Reshape(x, flat)  y = Reshape(a, flat)  z = Relu(a)")
    rule = apply_rule(SimplifyReshapes(), model)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert rule.matches == 0 and "gives a graph output its name" in rule.failures[0]
    x = normal(2, 3, 8)
    assert np.array_equal(answers(model, x=x)[0], x.reshape(-1, 8))
