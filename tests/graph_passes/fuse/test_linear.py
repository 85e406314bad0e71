"""Gemm by a weight is MatMul and Add; a Gemm that does more stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.exporter.weights import DerivedTensor
from qwenforge.graph_passes.fuse.linear import GemmToMatMul
from qwenforge.graph_passes.infra import RULE_TAG
from support.small_graphs import Array, answers, apply_rule, graph_from_text, normal, ops, relative_error
from support.tolerances import FLOAT16, FLOAT32_REORDERED

ROWS, COLUMNS = normal(6, 4), normal(4, 6)
"""The same linear layer of 4 inputs and 6 outputs as [out, in] and as [in, out]."""


def _model(node: str, dtype: str = "float", **weights: Array) -> ir.Model:
    return graph_from_text(f"({dtype}[B,4] x) => ({dtype}[B,6] y) {{ {node} }}", **weights)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float", FLOAT32_REORDERED), ("float16", FLOAT16)])
@pytest.mark.parametrize("bias_shape", [None, (6,), (1, 6), (1,)], ids=["no bias", "[out]", "[1, out]", "one number"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_becomes_matmul_with_in_out_weights(
    transposed: bool, bias_shape: tuple[int, ...] | None, dtype: str, tolerance: float
) -> None:
    kind = np.float32 if dtype == "float" else np.float16
    weights = {"w": (ROWS if transposed else COLUMNS).astype(kind)}
    if bias_shape is not None:
        weights["b"] = normal(*bias_shape, dtype=kind)
    model = _model(f"y = Gemm<transB = {int(transposed)}>({', '.join(('x', *weights))})", dtype, **weights)
    x = normal(3, 4, dtype=kind)
    expected = answers(model, x=x)[0]
    rule = apply_rule(GemmToMatMul(), model)
    assert rule.matches == 1 and rule.failures == []
    assert ops(model) == ["MatMul"] + ["Add"] * (bias_shape is not None)
    product = next(iter(model.graph))
    weight = product.inputs[1]
    assert product.name == "y" and product.metadata_props[RULE_TAG] == "gemm_to_matmul"
    assert weight is not None and weight.shape == ir.Shape([4, 6])
    assert (weight.name, isinstance(weight.const_value, DerivedTensor)) == (
        ("w.transposed", True) if transposed else ("w", False)
    )
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert relative_error(answers(model, x=x)[0], expected) <= tolerance


def test_weight_of_two_gemms_is_transposed_once() -> None:
    model = _model("a = Gemm<transB = 1>(x, w)  b = Gemm<transB = 1>(x, w)  y = Add(a, b)", w=ROWS)
    assert apply_rule(GemmToMatMul(), model).matches == 2
    assert len([name for name in model.graph.initializers if name.startswith("w.transposed")]) == 1


def test_weight_behind_a_transpose_is_taken_as_it_is() -> None:
    """Folding the Transpose is another rule's work."""
    model = _model("t = Transpose<perm = [1, 0]>(w)  y = Gemm(x, t)", w=ROWS)
    x = normal(3, 4)
    expected = answers(model, x=x)[0]
    assert apply_rule(GemmToMatMul(), model).matches == 1 and ops(model) == ["Transpose", "MatMul"]
    assert relative_error(answers(model, x=x)[0], expected) <= FLOAT32_REORDERED


SCALES = "a Gemm that scales or transposes its input"


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("y = Gemm<alpha = 0.5>(x, w)", SCALES),
        ("y = Gemm<beta = 2.0>(x, w, b)", SCALES),
        ("t = Transpose<perm = [1, 0]>(x)  y = Gemm<transA = 1>(t, w)", SCALES),
        ("t = MatMul(r, x)  y = Gemm<transB = 1>(x, t)", "a Gemm by the transpose of something that is not a weight"),
    ],
    ids=["alpha", "beta", "transA", "not a weight"],
)
def test_gemm_that_does_more_stays_and_is_told(node: str, reason: str) -> None:
    given = {"w": COLUMNS, "b": normal(6), "r": normal(6, 3)}
    model = _model(node, **{name: array for name, array in given.items() if f"{name}," in node or f"{name})" in node})
    before = ops(model)
    rule = apply_rule(GemmToMatMul(), model)
    assert rule.matches == 0 and ops(model) == before
    assert rule.failures == [f"{reason} (at node y)"]


def test_unused_beta_does_not_matter() -> None:
    assert apply_rule(GemmToMatMul(), _model("y = Gemm<beta = 0.0>(x, w)", w=COLUMNS)).matches == 1
