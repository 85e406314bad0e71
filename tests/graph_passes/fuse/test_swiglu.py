"""SwiGLU with its two projections merged; other gated units stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.exporter.weights import DerivedTensor
from qwenforge.graph_passes.fuse.swiglu import FuseSwiGLU
from qwenforge.graph_passes.infra import RULE_TAG
from support.small_graphs import Array, answers, apply_rule, graph_from_text, normal, ops, relative_error
from support.tolerances import FLOAT16, FLOAT32_REORDERED

HIDDEN, WIDTH = 8, 12
FUSED = ["MatMul", "Split", "Swish", "Mul"]
FORMS = {
    "silu by Sigmoid": "g = MatMul(x, gate)  s = Sigmoid(g)  a = Mul(g, s)  u = MatMul(x, up)  y = Mul(a, u)",
    "silu commuted": "u = MatMul(x, up)  g = MatMul(x, gate)  s = Sigmoid(g)  a = Mul(s, g)  y = Mul(u, a)",
    "Swish": "g = MatMul(x, gate)  a = Swish(g)  u = MatMul(x, up)  y = Mul(a, u)",
    "Swish commuted": "g = MatMul(x, gate)  a = Swish<alpha = 1.0>(g)  u = MatMul(x, up)  y = Mul(u, a)",
}
FLAT, BATCHED = f"T,{HIDDEN}", f"B,S,{HIDDEN}"


def _weights(dtype: type[np.floating] = np.float32) -> dict[str, Array]:
    return {"gate": normal(HIDDEN, WIDTH, dtype=dtype), "up": normal(HIDDEN, WIDTH, seed=1, dtype=dtype)}


def _model(nodes: str, signature: str | None = None, **given: Array) -> ir.Model:
    signature = signature or f"(float[{BATCHED}] x) => (float[B,S,{WIDTH}] y)"
    return graph_from_text(f"{signature} {{ {nodes} }}", **(_weights() | given))


@pytest.mark.parametrize("shape", [FLAT, BATCHED])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_one_projection(form: str, shape: str) -> None:
    result = shape.replace(str(HIDDEN), str(WIDTH))
    signature = f"(float[{shape}] x) => (float[{result}] y)"
    x = normal(*([5] if shape == FLAT else [2, 3]), HIDDEN)
    model = _model(FORMS[form], signature)
    gate, up = (w.astype(np.float64) for w in _weights().values())
    projected = x.astype(np.float64) @ gate
    expected = projected / (1 + np.exp(-projected)) * (x.astype(np.float64) @ up)
    assert relative_error(answers(model, x=x)[0], expected) <= FLOAT32_REORDERED
    rule = apply_rule(FuseSwiGLU(), model)
    assert rule.matches == 1 and rule.failures == [] and ops(model) == FUSED
    projection, split, swish, product = model.graph
    assert projection.inputs[0] is model.graph.inputs[0]
    assert swish.inputs[0] is split.outputs[0] and list(product.inputs) == [swish.outputs[0], split.outputs[1]]
    assert all(node.metadata_props[RULE_TAG] == "swiglu" for node in model.graph)
    assert projection.outputs[0].shape is not None and projection.outputs[0].shape[-1] == 2 * WIDTH
    assert product.outputs[0].shape is not None and product.outputs[0].shape[-1] == WIDTH
    assert relative_error(answers(model, x=x)[0], expected) <= FLOAT32_REORDERED


def test_half_precision_result_is_as_good_as_before() -> None:
    signature = f"(float16[{BATCHED}] x) => (float16[B,S,{WIDTH}] y)"
    model = _model(FORMS["silu by Sigmoid"], signature, **_weights(np.float16))
    x = normal(2, 3, HIDDEN, dtype=np.float16)
    expected = answers(model, x=x)[0]
    assert apply_rule(FuseSwiGLU(), model).matches == 1
    assert relative_error(answers(model, x=x)[0], expected) <= FLOAT16


def test_merged_weight_is_a_plan_named_after_its_parts() -> None:
    model = _model(FORMS["silu by Sigmoid"])
    gate, up = model.graph.initializers.values()
    gate.name = "model.layers.3.mlp.gate_proj.weight.transposed"
    apply_rule(FuseSwiGLU(), model)
    merged = model.graph.initializers["model.layers.3.mlp.gate_up_proj.weight"].const_value
    assert isinstance(merged, DerivedTensor) and merged.sources == (gate.const_value, up.const_value)
    names = ["gate_up_proj", "gate_up.split", "act_fn", "gated"]
    assert [node.name for node in model.graph] == [f"model.layers.3.mlp.{name}" for name in names]


@pytest.mark.parametrize(
    ("weight", "scopes", "name"),
    [
        (
            "val_9",
            "['', 'm.model.layers.1.mlp.shared_expert.gate_proj', 'linear']",
            "model.layers.1.mlp.shared_expert.",
        ),
        ("mlp.gate_proj.weight", "", "mlp."),
        ("val_9", "", "val_9."),
    ],
    ids=["PyTorch's module scopes", "a name without layers", "nothing but a number"],
)
def test_name_is_taken_from_what_the_exporter_left(weight: str, scopes: str, name: str) -> None:
    model = _model(FORMS["Swish"])
    model.graph.initializers["gate"].name = weight
    next(iter(model.graph)).metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    apply_rule(FuseSwiGLU(), model)
    assert next(iter(model.graph)).name == f"{name}gate_up_proj"


def test_shared_expert_beside_its_gate_is_merged_alone() -> None:
    nodes = FORMS["silu by Sigmoid"].replace("y =", "h =")
    nodes += "  d = MatMul(h, down)  e = MatMul(x, router)  f = Sigmoid(e)  y = Mul(f, d)"
    signature = f"(float[{FLAT}] x) => (float[{FLAT}] y)"
    model = _model(nodes, signature, down=normal(WIDTH, HIDDEN), router=normal(HIDDEN, 1))
    x = normal(5, HIDDEN)
    expected = answers(model, x=x)[0]
    rule = apply_rule(FuseSwiGLU(), model)
    assert rule.matches == 1 and rule.failures == []
    assert sorted(ops(model)) == sorted([*FUSED, "MatMul", "MatMul", "Sigmoid", "Mul"])
    assert relative_error(answers(model, x=x)[0], expected) <= FLOAT32_REORDERED


TORCH = FORMS["silu by Sigmoid"]
TWO_OUTPUTS = f"(float[{BATCHED}] x) => (float[B,S,{WIDTH}] y, float[B,S,{WIDTH}] %s)"
LOOK_ALIKES: dict[str, tuple[str, str | None, dict[str, Array], str]] = {
    "gate read elsewhere": (
        f"{TORCH}  z = Relu(g)",
        TWO_OUTPUTS % "z",
        {},
        "the gate or up projection has another use",
    ),
    "up read elsewhere": (f"{TORCH}  z = Relu(u)", TWO_OUTPUTS % "z", {}, "the gate or up projection has another use"),
    "gate is an output": (TORCH, TWO_OUTPUTS % "g", {}, "the gate or up projection has another use"),
    "sigmoid is an output": (TORCH, TWO_OUTPUTS % "s", {}, "the sigmoid of the gate has another use"),
    "activated gate read elsewhere": (
        f"{TORCH}  z = Relu(a)",
        TWO_OUTPUTS % "z",
        {},
        "the activated gate is not multiplied by one up projection",
    ),
    "different inputs": (
        TORCH.replace("MatMul(x, up)", "MatMul(o, up)").replace("g =", "o = Relu(x)  g ="),
        None,
        {},
        "gate and up project different tensors",
    ),
    "sigmoid of another tensor": (
        TORCH.replace("Sigmoid(g)", "Sigmoid(o)").replace("s =", "o = Neg(g)  s ="),
        None,
        {},
        "the sigmoid gates another tensor than its own input",
    ),
    "quick gelu": (
        TORCH.replace("Sigmoid(g)", "Sigmoid(o)").replace("s =", "o = Mul(g, slope)  s ="),
        None,
        {"slope": np.array(1.702, np.float32)},
        "the sigmoid gates another tensor than its own input",
    ),
    "gelu": (
        "g = MatMul(x, gate)  a = Gelu(g)  u = MatMul(x, up)  y = Mul(a, u)",
        None,
        {},
        "gated by Gelu, not Swish",
    ),
    "relu": (
        "g = MatMul(x, gate)  a = Relu(g)  u = MatMul(x, up)  y = Mul(a, u)",
        None,
        {},
        "gated by Relu, not Swish",
    ),
    "a steeper Swish": (
        FORMS["Swish"].replace("Swish(g)", "Swish<alpha = 1.702>(g)"),
        None,
        {},
        "Swish with an alpha other than 1",
    ),
    "up is no product": (
        TORCH.replace("u = MatMul(x, up)", "v = MatMul(x, up)  u = Relu(v)"),
        None,
        {},
        "gate and up are not both products with a weight",
    ),
    "up of one column": (TORCH, None, {"up": normal(HIDDEN, 1)}, "gate and up have different widths"),
    "a matrix for each row": (
        TORCH,
        None,
        {"up": normal(2, HIDDEN, WIDTH)},
        "gate or up is not a product with a weight matrix",
    ),
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alike_stays_and_is_told(case: str) -> None:
    nodes, signature, given, reason = LOOK_ALIKES[case]
    model = _model(nodes, signature, **given)
    before = ops(model)
    rule = apply_rule(FuseSwiGLU(), model)
    assert rule.matches == 0 and ops(model) == before
    assert len(rule.failures) == 1 and rule.failures[0].startswith(reason)


def test_merged_unit_is_left_as_it_is() -> None:
    model = _model(FORMS["Swish"])
    apply_rule(FuseSwiGLU(), model)
    again = apply_rule(FuseSwiGLU(), model)
    assert again.matches == 0 and again.failures == [] and ops(model) == FUSED
