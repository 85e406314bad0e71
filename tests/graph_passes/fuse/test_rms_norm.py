"""RMS normalization in every form that exporters write; look-alikes stay and are told."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.graph_passes.fuse.rms_norm import FuseRMSNorm
from qwenforge.graph_passes.infra import RULE_TAG
from support.small_graphs import Array, answers, apply_rule, graph_from_text, normal, ops, relative_error
from support.tolerances import BFLOAT16, FLOAT16, FLOAT32_REORDERED

SIZE = 16
EPSILON = 1e-6
MEAN = "p = Mul({h}, {h})  m = ReduceMean(p, last)  v = Add(m, eps)"
FORMS = {
    "torch": f"{MEAN.replace('Mul({h}, {h})', 'Pow({h}, two)')}  r = Sqrt(v)  i = Reciprocal(r)  n = Mul({{h}}, i)",
    "commuted": f"{MEAN.replace('m, eps', 'eps, m')}  r = Sqrt(v)  i = Reciprocal(r)  n = Mul(i, {{h}})",
    "division": f"{MEAN}  r = Sqrt(v)  n = Div({{h}}, r)",
    "inverse": f"{MEAN}  r = Sqrt(v)  i = Div(one, r)  n = Mul({{h}}, i)",
    "power": f"{MEAN}  i = Pow(v, root)  n = Mul({{h}}, i)",
}
TORCH = f"{FORMS['torch'].format(h='x')}  y = Mul(w, n)"
"""The first form as a whole graph, without casts."""
TYPES: dict[str, tuple[Any, int]] = {
    "float": (np.float32, 1),
    "float16": (np.float16, 10),
    "bfloat16": (ml_dtypes.bfloat16, 16),
}


def _constants(dtype: Any = np.float32) -> dict[str, Array]:
    numbers = {"two": 2, "one": 1, "root": -0.5, "eps": EPSILON}
    return {"last": np.array([-1]), **{name: np.array(number, dtype) for name, number in numbers.items()}}


def _model(nodes: str, signature: str = f"(float[B,S,{SIZE}] x) => (float[B,S,{SIZE}] y)", **given: Array) -> ir.Model:
    weights = {"w": 1 + normal(SIZE) / 4, **_constants(), **given}
    used = {name: array for name, array in weights.items() if f", {name})" in nodes or f"({name}," in nodes}
    return graph_from_text(f"{signature} {{ {nodes} }}", **used)


def _expected(x: Array, weight: Array) -> Array:
    wide = x.astype(np.float64)
    result: Array = weight.astype(np.float64) * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON)
    return result


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_node(form: str, weight_first: bool) -> None:
    model = _model(f"{FORMS[form].format(h='x')}  y = Mul({'w, n' if weight_first else 'n, w'})")
    rule = apply_rule(FuseRMSNorm(), model)
    assert rule.matches == 1 and rule.failures == [] and ops(model) == ["RMSNormalization"]
    (node,) = model.graph
    assert node.attributes["axis"].as_int() == -1 and node.attributes["stash_type"].as_int() == 1
    assert node.attributes["epsilon"].as_float() == pytest.approx(EPSILON)
    assert [value.name for value in node.inputs if value is not None] == ["x", "w"]
    assert node.name == "w" and node.metadata_props[RULE_TAG] == "rms_norm"
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    x = normal(2, 3, SIZE)
    assert relative_error(answers(model, x=x)[0], _expected(x, weight.numpy())) <= FLOAT32_REORDERED


def _with_casts(form: str, kind: str) -> ir.Model:
    dtype, code = TYPES[kind]
    nodes = f"h = Cast<to = 1>(x)  {FORMS[form].format(h='h')}  d = Cast<to = {code}>(n)  y = Mul(w, d)"
    weight = (1 + normal(SIZE) / 4).astype(dtype)
    return _model(nodes, f"({kind}[B,S,{SIZE}] x) => ({kind}[B,S,{SIZE}] y)", w=weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_casts_to_fp32_and_back_are_part_of_it(kind: str, form: str) -> None:
    model = _with_casts(form, kind)
    rule = apply_rule(FuseRMSNorm(), model)
    assert rule.matches == 1 and rule.failures == [] and ops(model) == ["RMSNormalization"]
    (node,) = model.graph
    assert node.inputs[0] is model.graph.inputs[0]
    assert node.outputs[0].dtype is not None and node.outputs[0].dtype.name.lower() == kind


def test_half_precision_result_is_as_good_as_before() -> None:
    before, after = _with_casts("torch", "float16"), _with_casts("torch", "float16")
    apply_rule(FuseRMSNorm(), after)
    x = normal(2, 3, SIZE, scale=30, dtype=np.float16)
    assert relative_error(answers(after, x=x)[0], answers(before, x=x)[0]) <= FLOAT16


def test_bfloat16_result_is_as_good_as_before() -> None:
    """By ONNX's reference implementation: ONNX Runtime has few bf16 kernels."""
    from onnx.reference import ReferenceEvaluator

    x = normal(2, 3, SIZE, dtype=ml_dtypes.bfloat16)
    before, after = _with_casts("torch", "bfloat16"), _with_casts("torch", "bfloat16")
    apply_rule(FuseRMSNorm(), after)
    found, wanted = (ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0] for model in (after, before))
    assert relative_error(np.asarray(found), np.asarray(wanted)) <= BFLOAT16


def test_norm_of_each_head_is_fused() -> None:
    """Qwen3 normalizes queries and keys [B, S, H, D] over D."""
    model = _model(TORCH, f"(float[B,S,4,{SIZE}] x) => (float[B,S,4,{SIZE}] y)", last=np.array([3]))
    assert apply_rule(FuseRMSNorm(), model).matches == 1
    x, weight = normal(2, 3, 4, SIZE), model.graph.initializers["w"].const_value
    assert weight is not None
    assert relative_error(answers(model, x=x)[0], _expected(x, weight.numpy())) <= FLOAT32_REORDERED


def test_half_precision_without_casts_is_fused() -> None:
    """The fused node sums in fp32, where the graph did in fp16."""
    constants = {**_constants(np.float16), "eps": np.array(1e-3, np.float16), "w": normal(SIZE, dtype=np.float16)}
    model = _model(TORCH, f"(float16[B,S,{SIZE}] x) => (float16[B,S,{SIZE}] y)", **constants)
    x = normal(2, 3, SIZE, dtype=np.float16)
    expected = answers(model, x=x)[0]
    assert apply_rule(FuseRMSNorm(), model).matches == 1
    assert relative_error(answers(model, x=x)[0], expected) <= FLOAT16


def test_norm_that_stays_in_fp32_keeps_the_cast_in_front() -> None:
    """fp16 in, fp32 weight and result: what is normalized is the fp32 copy."""
    nodes = f"h = Cast<to = 1>(x)  {FORMS['torch'].format(h='h')}  y = Mul(w, n)"
    model = _model(nodes, f"(float16[B,S,{SIZE}] x) => (float[B,S,{SIZE}] y)")
    x = normal(2, 3, SIZE, dtype=np.float16)
    expected = answers(model, x=x)[0]
    assert apply_rule(FuseRMSNorm(), model).matches == 1 and ops(model) == ["Cast", "RMSNormalization"]
    assert relative_error(answers(model, x=x)[0], expected) <= FLOAT32_REORDERED


def test_weight_applied_in_fp32_keeps_both_casts() -> None:
    nodes = f"h = Cast<to = 1>(x)  {FORMS['torch'].format(h='h')}  s = Mul(w, n)  y = Cast<to = 10>(s)"
    model = _model(nodes, f"(float16[B,S,{SIZE}] x) => (float16[B,S,{SIZE}] y)")
    x = normal(2, 3, SIZE, dtype=np.float16)
    expected = answers(model, x=x)[0]
    assert apply_rule(FuseRMSNorm(), model).matches == 1 and ops(model) == ["Cast", "RMSNormalization", "Cast"]
    assert relative_error(answers(model, x=x)[0], expected) <= FLOAT16


LOOK_ALIKES: dict[str, tuple[str, dict[str, Array], str]] = {
    "layer normalization": (
        f"u = ReduceMean(x, last)  h = Sub(x, u)  {FORMS['torch'].format(h='h')}  s = Mul(w, n)  y = Add(s, w)",
        {},
        "the mean is subtracted first: a layer normalization",
    ),
    "another axis": (TORCH, {"last": np.array([1])}, "the mean of squares is not over the last axis"),
    "two axes": (TORCH, {"last": np.array([1, 2])}, "the mean of squares is not over the last axis"),
    "a dropped axis": (
        TORCH.replace("ReduceMean(p, last)", "ReduceMean<keepdims = 0>(p, last)").replace(
            "v = Add(m, eps)", "k = Unsqueeze(m, last)  v = Add(k, eps)"
        ),
        {},
        "the mean of squares drops its axis",
    ),
    "epsilon outside the root": (
        TORCH.replace("v = Add(m, eps)  r = Sqrt(v)", "v = Sqrt(m)  r = Add(v, eps)"),
        {},
        "no small constant is added to the mean of squares",
    ),
    "a large epsilon": (TORCH, {"eps": np.array(1.0, np.float32)}, "no small constant is added to the mean of squares"),
    "no root": (TORCH.replace("Sqrt", "Neg"), {}, "x is not divided by the root of its mean square plus epsilon"),
    "another tensor scaled": (
        TORCH.replace("n = Mul(x, i)", "o = Relu(x)  n = Mul(o, i)"),
        {},
        "x is not divided by the root of its mean square plus epsilon",
    ),
    "no weight": (
        TORCH.replace("y = Mul(w, n)", "y = Neg(n)"),
        {},
        "the normalized tensor is not multiplied by a weight",
    ),
    "one weight for all": (
        TORCH,
        {"w": np.array([2.0], np.float32)},
        "the weight is not a vector over the last axis",
    ),
    "a weight for each token": (
        TORCH,
        {"w": normal(3, SIZE)},
        "the weight is not a vector over the last axis",
    ),
    "computed in less precision": (
        f"h = Cast<to = 10>(x)  {FORMS['torch'].format(h='h')}  d = Cast<to = 1>(n)  y = Mul(w, d)",
        {**_constants(np.float16), "eps": np.array(1e-3, np.float16)},
        "the normalized tensor is cast to another type than x was cast from",
    ),
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alike_stays_and_is_told(case: str) -> None:
    nodes, given, reason = LOOK_ALIKES[case]
    model = _model(nodes, **given)
    before = ops(model)
    rule = apply_rule(FuseRMSNorm(), model)
    assert rule.matches == 0 and ops(model) == before
    assert len(rule.failures) == 1 and rule.failures[0].startswith(reason)


def test_mean_of_cubes_is_no_look_alike() -> None:
    model = _model(TORCH, two=np.array(3, np.float32))
    rule = apply_rule(FuseRMSNorm(), model)
    assert rule.matches == 0 and rule.failures == []
