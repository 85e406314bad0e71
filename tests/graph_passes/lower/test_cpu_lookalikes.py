"""Graphs that look like what our CPU ops compute and are not: each stays as far as it has to, and answers the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import names
from qwenforge.engine.cpu_library import library_of
from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import rounded
from qwenforge.graph_passes.infra import set_weight
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.lower.cpu_ops import cpu_op_rules
from qwenforge.graph_passes.quantize.sites import KEPT_BY_DEFAULT, find_sites
from support.cached_decoder import CachedDecoder, random_tokens
from support.portable_models import portable_model, random_model
from support.small_graphs import apply_rule
from support.tolerances import FLOAT32_MODEL

FIRST = "model.layers.0"


def lowered(kind: str) -> ir.Model:
    """Two layers for ONNX Runtime's kernels."""
    config = {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False} if kind == "qwen2_moe" else {}
    model = portable_model(random_model(kind, num_hidden_layers=2, **config))  # type: ignore[arg-type]
    sites = find_sites(model)
    for site in sites.linear.values():
        if site.role not in KEPT_BY_DEFAULT:
            found = rounded(weights.transpose(site.weight, (1, 0)), "int4", 16)
            set_weight(model, site.node, 1, weights.transpose(found.dequantized(), (1, 0)))
    for experts in sites.experts.values():
        for index in (2, 3):
            value = experts.node.inputs[index]
            assert value is not None and value.const_value is not None
            set_weight(model, experts.node, index, rounded(value.const_value, "int4", 16).dequantized())
    return lower(model, "ort-cpu", products="blocks")


def node_of(model: ir.Model, *parts: str) -> ir.Node:
    """The first layer's node with all of ``parts`` in its name or op."""
    (found,) = (
        node
        for node in model.graph
        if (node.name or "").startswith(FIRST) and all(part in f"{node.name} {node.op_type}" for part in parts)
    )
    return found


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape))
    value.const_value = ir.tensor(array.astype(np.float32), name=name)
    model.graph.register_initializer(value)
    return value


def insert(model: ir.Model, before: ir.Node, op_type: str, inputs: list[ir.Value | None]) -> ir.Value:
    """A new node's result, of the first input's type and shape."""
    node = ir.node(op_type, inputs, name=f"{before.name}.new")
    source = inputs[0]
    assert source is not None
    node.outputs[0].name = f"{node.name}.output"
    node.outputs[0].shape, node.outputs[0].type = source.shape, source.type
    model.graph.insert_before(before, node)
    return node.outputs[0]


def another_activation(model: ir.Model) -> None:
    node_of(model, "QuickGelu").attributes["alpha"] = ir.AttrFloat32("alpha", 1.5)


def up_of_other_values(model: ir.Model) -> None:
    up = product_of(model, "gate_up_proj", 1)
    up.replace_input_with(0, insert(model, up, "Neg", [up.inputs[0]]))


def product_of(model: ir.Model, name: str, index: int) -> ir.Node:
    found = [node for node in model.graph if node.op_type == "MatMulNBits" and name in (node.name or "")]
    return found[index]


def gate_with_two_readers(model: ir.Model) -> None:
    """The product by gate's matrix is read beside SiLU too."""
    gated, silu = node_of(model, "gated", "Mul"), node_of(model, "QuickGelu")
    index = list(gated.inputs).index(silu.outputs[0])
    gated.replace_input_with(index, insert(model, gated, "Add", [silu.outputs[0], silu.inputs[0]]))


def norm_with_two_readers(model: ir.Model) -> None:
    norm, down = node_of(model, "post_attention_layernorm"), node_of(model, "down_proj", "MatMulNBits")
    (addition,) = (node for node, _ in down.outputs[0].uses())
    result = down.outputs[0]
    new = insert(model, addition, "Add", [result, norm.outputs[0]])
    addition.replace_input_with(list(addition.inputs).index(result), new)


def biases_of_another_shape(model: ir.Model) -> None:
    """One number for all outputs, and one for each row and output."""
    for layer, shape in (("0", (1,)), ("1", (1, 1, 128))):
        (addition,) = (
            node
            for node in model.graph
            if node.op_type == "Add" and f"layers.{layer}.self_attn.qkv" in (node.name or "")
        )
        bias = constant(model, f"bias.{layer}", np.full(shape, 0.25))
        addition.replace_input_with(1, bias)


def norm_with_a_bias(model: ir.Model) -> None:
    norm = node_of(model, "post_attention_layernorm")
    assert norm.op_type == "SkipSimplifiedLayerNormalization"
    norm.resize_inputs(4)
    norm.replace_input_with(3, constant(model, "norm.bias", np.linspace(-1, 1, 64)))


def norm_by_a_computed_weight(model: ir.Model) -> None:
    norm = node_of(model, "post_attention_layernorm")
    norm.replace_input_with(2, insert(model, norm, "Neg", [norm.inputs[2]]))


def router_of_other_values(model: ir.Model) -> None:
    router = node_of(model, "mlp.gate", "MatMul")
    router.replace_input_with(0, insert(model, router, "Neg", [router.inputs[0]]))


def shared_gate_of_other_values(model: ir.Model) -> None:
    gate = node_of(model, "shared_expert_gate", "MatMul")
    gate.replace_input_with(0, insert(model, gate, "Neg", [gate.inputs[0]]))


def experts_weighted_by_something_else(model: ir.Model) -> None:
    experts = node_of(model, "QMoE")
    experts.replace_input_with(14, insert(model, experts, "Sqrt", [experts.inputs[14]]))


_ALL = {"CachedAttention": 2, "QuantizedLinear": 4, "QuantizedGatedMlp": 2}
_EXPERTS = {"CachedAttention": 2, "QuantizedLinear": 4, "QuantizedMixtureOfExperts": 2}
_OPEN = {**_ALL, "QuantizedGatedMlp": 1, "QuantizedLinear": 7}
ALTERED: dict[str, tuple[Callable[[ir.Model], None], str, dict[str, int]]] = {
    "another activation": (another_activation, "qwen2", _OPEN),
    "up of other values": (up_of_other_values, "qwen2", _OPEN),
    "gate with two readers": (gate_with_two_readers, "qwen2", _OPEN),
    "norm with two readers": (norm_with_two_readers, "qwen2", _ALL),
    "biases of another shape": (biases_of_another_shape, "qwen2", _ALL),
    "norm with a bias": (norm_with_a_bias, "qwen2", _ALL),
    "norm by a computed weight": (norm_by_a_computed_weight, "qwen2", _ALL),
    "router of other values": (
        *(router_of_other_values, "qwen2_moe"),
        {**_EXPERTS, "QuantizedMixtureOfExperts": 1, "QuantizedGatedMlp": 1},
    ),
    # The shared expert alone is an MLP then.
    "shared gate of other values": (shared_gate_of_other_values, "qwen2_moe", {**_EXPERTS, "QuantizedGatedMlp": 1}),
    "experts weighted by something else": (
        *(experts_weighted_by_something_else, "qwen2_moe"),
        {**_EXPERTS, "QuantizedMixtureOfExperts": 1, "QuantizedGatedMlp": 1},
    ),
}


def _answers(model: ir.Model) -> np.ndarray:
    decoder, tokens = CachedDecoder(model, capacity=16, library=library_of(model)), random_tokens(12)
    return np.concatenate([decoder.step([part])[0] for part in (tokens[:7], tokens[7:11], tokens[11:])])


@pytest.mark.parametrize("name", ALTERED)
def test_lookalike_is_left_alone(name: str) -> None:
    change, kind, expected = ALTERED[name]
    model = lowered(kind)
    unchanged = _answers(model)
    change(model)
    answers = _answers(model)
    assert np.abs(answers - unchanged).max() > 0.01, "it is another model now"
    for rule in cpu_op_rules():
        apply_rule(rule, model)
    found = Counter(node.op_type for node in model.graph if node.domain == names.CPU_DOMAIN)
    assert found == expected
    errors = np.linalg.norm(_answers(model) - answers, axis=1) / np.linalg.norm(answers, axis=1)
    assert np.median(errors) < FLOAT32_MODEL, errors
