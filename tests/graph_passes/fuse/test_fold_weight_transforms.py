"""Layout changes of weights: planned, never computed; those of anything else stay."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.exporter.weights import DerivedTensor
from qwenforge.graph_passes.fuse.fold_weight_transforms import FoldWeightTransforms
from support.small_graphs import Array, answers, apply_rule, graph_from_text, normal, ops

WEIGHT = normal(6, 4)
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Transpose": ("t = Transpose(w)  y = MatMul(x, t)", {}, ["w.transposed"]),
    "Transpose by perm": ("t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t)", {}, ["w.transposed"]),
    "Reshape": ("t = Reshape(w, to)  y = MatMul(x, t)", {"to": [4, -1]}, ["w.reshaped"]),
    "Reshape that copies": ("t = Reshape(w, to)  y = MatMul(z, t)", {"to": [0, -1]}, ["w.reshaped"]),
    "Unsqueeze": (
        "t = Unsqueeze(w, to)  a = MatMul(z, t)  y = ReduceSum<keepdims = 0>(a, first)",
        {"to": [-3], "first": [0]},
        ["w.reshaped"],
    ),
    "Squeeze": ("t = Squeeze(w3, to)  y = MatMul(z, t)", {"to": [0]}, ["w3.reshaped"]),
    "Squeeze of all": ("t = Squeeze(w3)  y = MatMul(z, t)", {}, ["w3.reshaped"]),
    "Concat": ("t = Concat<axis = -1>(w, w)  y = MatMul(z, t)", {}, ["w.joined"]),
    "Slice": ("t = Slice(w, low, high, on)  y = MatMul(x, t)", {"low": [1], "high": [-1], "on": [-2]}, ["w.part"]),
    "Slice of the first axes": ("t = Slice(w, low, high)  y = MatMul(x, t)", {"low": [-4], "high": [99]}, ["w.part"]),
    "Slice by steps of 1": (
        "t = Slice(w, low, high, on, by)  y = MatMul(x, t)",
        {"low": [0], "high": [4], "on": [0], "by": [1]},
        ["w.part"],
    ),
    "Split, one part unused": ("t, u = Split(w, sizes)  y = MatMul(x, t)", {"sizes": [4, 2]}, ["w.part"]),
    "Split into equal parts": (
        "t, u = Split<axis = 1, num_outputs = 2>(w)  a = MatMul(z, t)  b = MatMul(z, u)  y = Add(a, b)",
        {},
        ["w.part", "w.part_1"],
    ),
    "Cast there and back": ("s = Cast<to = 11>(w)  t = Cast<to = 1>(s)  y = MatMul(z, t)", {}, ["w.cast.cast"]),
    "a chain": (
        "a = Transpose<perm = [1, 0]>(w)  b = Unsqueeze(a, to)  t = Squeeze(b, to)  y = MatMul(x, t)",
        {"to": [0]},
        ["w.transposed.reshaped.reshaped"],
    ),
}
KEPT = {"MatMul", "Add", "ReduceSum"}


def _model(nodes: str, **constants: Any) -> ir.Model:
    given = {"w": WEIGHT, "w3": WEIGHT[None], **{name: np.asarray(value) for name, value in constants.items()}}
    used = {name: tensor for name, tensor in given.items() if f"({name}" in nodes or f", {name}" in nodes}
    return graph_from_text(f"(float[B,4] x, float[B,6] z) => (float[N,M] y) {{ {nodes} }}", **used)


@pytest.mark.parametrize("case", CASES)
def test_layout_change_of_a_weight_becomes_a_plan_with_the_same_values(case: str) -> None:
    nodes, constants, names = CASES[case]
    model = _model(nodes, **constants)
    feeds = {"x": normal(3, 4), "z": normal(3, 6)}
    changes = [op for op in ops(model) if op not in KEPT]
    expected = answers(model, **feeds)
    rule = apply_rule(FoldWeightTransforms(), model)
    assert rule.failures == [] and rule.matches == len(changes)
    assert set(ops(model)) <= KEPT
    read = dict.fromkeys(
        str(node.inputs[1].name) for node in model.graph if node.op_type == "MatMul" and node.inputs[1]
    )
    assert list(read) == names
    assert np.array_equal(answers(model, **feeds)[0], expected[0])


class Unreadable(ir.Tensor):
    """A weight that must not be evaluated."""

    def numpy(self) -> NoReturn:
        raise AssertionError("the weight was read")

    tobytes = numpy


def test_weight_is_not_read() -> None:
    weight = Unreadable(WEIGHT, name="w")
    model = _model("a = Transpose(w)  b, c = Split<axis = 1, num_outputs = 2>(a)  y = MatMul(x, c)", w=np.zeros((6, 4)))
    model.graph.initializers["w"].const_value = weight
    assert apply_rule(FoldWeightTransforms(), model).matches == 2
    plan = model.graph.initializers["w.transposed.part_1"].const_value
    assert isinstance(plan, DerivedTensor) and plan.sources[0].sources == (weight,)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("nodes", "constants", "reason"),
    [
        ("t = Cast<to = 7>(w)  s = Cast<to = 1>(t)  y = MatMul(z, s)", {}, "Cast of a weight that no plan"),
        (
            "t = Slice(w, low, high, on, by)  y = MatMul(x, t)",
            {"low": [0], "high": [6], "on": [0], "by": [2]},
            "Slice of a weight that no plan",
        ),
        ("s = Shape(x)  t = Reshape(w, s)  y = MatMul(x, t)", {}, "Reshape of a weight that no plan"),
    ],
    ids=["cast to integers", "every second row", "a computed shape"],
)
def test_change_that_no_plan_describes_stays_and_is_told(nodes: str, constants: dict[str, Any], reason: str) -> None:
    model = _model(nodes, **constants)
    before = ops(model)
    rule = apply_rule(FoldWeightTransforms(), model)
    assert rule.matches == 0 and ops(model) == before
    assert len(rule.failures) == 1 and rule.failures[0].startswith(reason)


@pytest.mark.parametrize(
    "nodes",
    ["t = Transpose(x)  y = MatMul(w, t)", "t = Concat<axis = 0>(w, z)  y = Relu(t)", "y = Transpose(w)"],
    ids=["of an activation", "of a weight and an activation", "that is the graph's output"],
)
def test_change_of_something_else_stays(nodes: str) -> None:
    model = _model(nodes)
    before = ops(model)
    rule = apply_rule(FoldWeightTransforms(), model)
    assert rule.matches == 0 and rule.failures == [] and ops(model) == before


def test_integers_and_scalars_are_left_to_constant_folding() -> None:
    model = graph_from_text(
        "(float[B,4] x) => (float[N,M] y) "
        "{ s = Reshape(to, flat)  e = Unsqueeze(scale, flat)  a = Reshape(x, s)  y = Mul(a, e) }",
        to=np.array([[2, -1]]),
        flat=np.array([-1]),
        scale=np.array(2.0, np.float32),
    )
    assert apply_rule(FoldWeightTransforms(), model).matches == 0


def test_weight_that_a_caller_may_replace_stays() -> None:
    """An initializer that is also a graph input is only a default."""
    model = _model("t = Transpose(w)  y = MatMul(x, t)")
    model.graph.inputs.append(model.graph.initializers["w"])
    assert apply_rule(FoldWeightTransforms(), model).matches == 0
    other: Array = normal(6, 4, seed=9)
    x = normal(3, 4)
    assert np.allclose(answers(model, x=x, z=normal(3, 6), w=other)[0], x @ other.T, atol=1e-6)
