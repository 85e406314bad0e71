"""Quantized matrices on ort-cpu against the portable graph that multiplies by the dequantized ones."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.errors import UnsupportedError
from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import rounded
from qwenforge.exporter.quantized_weights import quantize
from qwenforge.graph_passes.functions import (
    GROUPED_QUERY_ATTENTION,
    MIXTURE_OF_EXPERTS,
    QUANTIZED_ATTENTION,
    QUANTIZED_EXPERTS,
)
from qwenforge.graph_passes.infra import set_weight
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.lower.ort_quantized_embedding import TiedQuantizedEmbedding
from qwenforge.graph_passes.lower.ort_quantized_linear import Form, LowerQuantizedLinear, unquantized
from qwenforge.graph_passes.lower.ort_quantized_moe import LowerQuantizedExperts
from qwenforge.graph_passes.quantize.sites import KEPT_BY_DEFAULT, find_sites
from support.cached_decoder import CachedDecoder, random_tokens
from support.expert_graphs import expert_case
from support.portable_models import portable_model, random_model
from support.small_graphs import Array, answers, apply_rule, graph_from_text, normal, ops, relative_error
from support.tolerances import FLOAT32_MODEL, FLOAT32_REORDERED, INT8_ACTIVATIONS

Integer = Literal["int8", "int4"]
LINEAR = "(float[B,S,64] x) => (float[B,S,48] y) { y = MatMul(x, w) }"
STATIC = """(float[B,S,64] x) => (float[B,S,48] y)
    { q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = MatMul(d, w) }"""


def _matrix(weight_format: Integer, group: int | None, columns: int = 64, rows: int = 48) -> ir.TensorProtocol:
    """A quantized matrix [columns, rows] as a MatMul takes it."""
    found = rounded(ir.tensor(normal(rows, columns, seed=1)), weight_format, group or columns)
    return weights.transpose(found.dequantized(), (1, 0))


def _exact(model: ir.Model) -> ir.Model:
    """The same with fp32 activations in the kernels, which then compute what the portable graph computes."""
    for node in model.graph:
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    return model


@pytest.mark.parametrize(("weight_format", "group"), [("int8", None), ("int8", 32), ("int4", 16), ("int4", 64)])
def test_product_of_blocks_is_that_of_the_dequantized_matrix(weight_format: Integer, group: int | None) -> None:
    w, x = _matrix(weight_format, group), normal(2, 5, 64)
    expected = answers(graph_from_text(LINEAR, w=w), x=x)[0]
    model = graph_from_text(LINEAR, w=w)
    assert apply_rule(LowerQuantizedLinear("blocks"), model).matches == 1
    assert ops(model) == ["MatMulNBits"] and model.graph[0].attributes["accuracy_level"].as_int() == 4
    assert relative_error(answers(model, x=x)[0], expected) < INT8_ACTIVATIONS
    assert relative_error(answers(_exact(model), x=x)[0], expected) < FLOAT32_REORDERED


@pytest.mark.parametrize("form", ["static", "integers"])
def test_static_activations_are_rounded_as_in_the_portable_graph(form: Form) -> None:
    """Values beyond the scale's reach included, which saturate at the same code."""
    given = {"w": _matrix("int8", None), "s": np.array(0.02, np.float32), "z": np.array(0, np.int8)}
    x = normal(2, 7, 64) * 2
    expected = answers(graph_from_text(STATIC, **given), x=x)[0]
    model = graph_from_text(STATIC, **given)
    assert apply_rule(LowerQuantizedLinear(form), model).matches == 1
    assert ops(model) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    assert relative_error(answers(model, x=x)[0], expected) < FLOAT32_REORDERED


def test_products_of_one_input_share_its_codes() -> None:
    text = "(float[B,S,64] x) => (float[B,S,48] y, float[B,S,48] z) { y = MatMul(x, v)  z = MatMul(x, w) }"
    model = graph_from_text(text, v=_matrix("int8", None), w=_matrix("int8", None))
    apply_rule(LowerQuantizedLinear("integers"), model)
    assert ops(model).count("QuantizeLinear") == 1 and ops(model).count("MatMulIntegerToFloat") == 2


def test_activations_without_a_calibration_have_a_scale_for_each_token() -> None:
    """A token a thousand times as large as the others costs those nothing, and one of zeros gives zeros."""
    w, x = _matrix("int8", None), normal(1, 6, 64)
    x[0, 2] *= 1000
    x[0, 4] = 0
    model = graph_from_text(LINEAR, w=w)
    apply_rule(LowerQuantizedLinear("integers"), model)
    found = answers(model, x=x)[0]
    steps = np.abs(x).max(-1, keepdims=True) / 127
    codes = np.rint(np.divide(x, steps, out=np.zeros_like(x), where=steps > 0))
    assert relative_error(found, (codes * steps) @ w.numpy()) < FLOAT32_REORDERED
    assert not found[0, 4].any()


@pytest.mark.parametrize("group", [16, 32])
def test_prefill_of_four_bit_weights_rounds_the_weights_as_they_were(group: int) -> None:
    w, x = _matrix("int4", group), normal(1, 6, 64)
    model = graph_from_text(LINEAR, w=w)
    apply_rule(LowerQuantizedLinear("integers"), model)
    original = normal(48, 64, seed=1).T
    assert relative_error(answers(model, x=x)[0], x @ original) < INT8_ACTIVATIONS
    np.testing.assert_array_equal(unquantized(w).numpy(), original)


def test_codes_of_a_checkpoint_have_no_weights_behind_them() -> None:
    found = rounded(ir.tensor(normal(48, 64)), "int4", 32)
    stored = type(found)(
        weights.cast(ir.tensor(found.codes.numpy().astype(np.float32)), ir.DataType.INT4), found.scales, None, 32
    )
    assert unquantized(stored.dequantized()).numpy().tolist() == found.dequantized().numpy().tolist()


def test_fp8_weights_are_refused_by_name() -> None:
    scales = ir.tensor(np.full((48, 1), 0.01, np.float32))
    found = quantize(ir.tensor(normal(48, 64)), "fp8", scales, group_size=64)
    model = graph_from_text(LINEAR, w=weights.transpose(found.dequantized(), (1, 0)))
    with pytest.raises(UnsupportedError, match="y: ONNX Runtime has no FP8 product on a CPU"):
        LowerQuantizedLinear("blocks")(model)


def test_groups_that_no_block_divides_stay_dequantized() -> None:
    model = graph_from_text(LINEAR, w=_matrix("int4", 24))
    rule = apply_rule(LowerQuantizedLinear("blocks"), model)
    assert rule.matches == 0 and "groups of 24 columns" in rule.failures[0] and ops(model) == ["MatMul"]


def test_embedding_tied_to_a_quantized_projection_reads_its_codes() -> None:
    table = ir.tensor(normal(10, 64), name="table")
    text = "(int64[B,S] tokens) => (float[B,S,10] y, float[B,S,64] x) { x = Gather(table, tokens)  y = MatMul(x, w) }"
    found = rounded(table, "int8", 64)
    model = graph_from_text(text, table=table, w=weights.transpose(found.dequantized(), (1, 0)))
    assert apply_rule(TiedQuantizedEmbedding(), model).matches == 1
    assert apply_rule(LowerQuantizedLinear("blocks"), model).matches == 1
    assert ops(model) == ["GatherBlockQuantized", "MatMulNBits"]
    tokens = np.array([[3, 0, 9]])
    y, x = answers(_exact(model), tokens=tokens)
    np.testing.assert_array_equal(x, found.dequantized().numpy()[tokens])
    assert relative_error(y, x @ found.dequantized().numpy().T) < FLOAT32_REORDERED
    first, second = (node.inputs[index].const_value.tobytes() for node, index in zip(model.graph, (0, 1), strict=True))
    assert first == second, "the data file holds equal bytes once"


def test_embedding_of_another_table_stays() -> None:
    text = "(int64[B,S] tokens) => (float[B,S,10] y) { x = Gather(table, tokens)  y = MatMul(x, w) }"
    w = weights.transpose(rounded(ir.tensor(normal(10, 64)), "int8", 64).dequantized(), (1, 0))
    model = graph_from_text(text, table=normal(10, 64, seed=5), w=w)
    assert apply_rule(TiedQuantizedEmbedding(), model).matches == 0


def _experts(weight_format: Integer, *, normalize: bool) -> tuple[ir.Model, Array, dict[str, Array]]:
    """A call with quantized weights, what numpy makes of the dequantized ones, and the inputs."""
    case = expert_case(12, 4, normalize=normalize, hidden=64, intermediate=48)
    model = case.graph()
    node = next(node for node in model.graph if node.op_type == MIXTURE_OF_EXPERTS)
    restored = []
    for index, array in ((2, case.gate_up), (3, case.down)):
        found = rounded(ir.tensor(np.ascontiguousarray(array)), weight_format, array.shape[-1])
        set_weight(model, node, index, found.dequantized())
        restored.append(found.dequantized().numpy())
    case.gate_up[:], case.down[:] = restored
    return model, case.expected(), case.feeds()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weight_format", ["int4", "int8"])
def test_quantized_experts_are_weighted_as_the_model_says(weight_format: Integer, normalize: bool) -> None:
    """The kernel renormalizes whatever it is told, unless it is given the weights: half of the answer otherwise."""
    model, expected, feeds = _experts(weight_format, normalize=normalize)
    assert apply_rule(LowerQuantizedExperts(), model).matches == 1
    assert ops(model) == (["QMoE"] if normalize else ["Softmax", "QMoE"])
    assert relative_error(answers(model, **feeds)[0], expected) < INT8_ACTIVATIONS
    if weight_format == "int4":
        assert relative_error(answers(_exact(model), **feeds)[0], expected) < FLOAT32_REORDERED


def _quantize_sites(model: ir.Model, weight_format: Integer, group: int | None) -> ir.Model:
    sites = find_sites(model)
    for site in sites.linear.values():
        if site.role not in KEPT_BY_DEFAULT:
            matrix = weights.transpose(site.weight, (1, 0))
            found = rounded(matrix, weight_format, group or weights.dims(matrix)[1])
            set_weight(model, site.node, 1, weights.transpose(found.dequantized(), (1, 0)))
    for experts in sites.experts.values():
        for index in (2, 3):
            value = experts.node.inputs[index]
            assert value is not None and value.const_value is not None
            size = group or weights.dims(value.const_value)[2]
            set_weight(model, experts.node, index, rounded(value.const_value, weight_format, size).dequantized())
    return model


def _answers_of(model: ir.Model) -> Array:
    """Prefill, a chunk against a part-filled cache, then single tokens."""
    decoder, tokens = CachedDecoder(model, capacity=20), random_tokens(20)
    parts = [tokens[:9], tokens[9:15], *([token] for token in tokens[15:])]
    return np.concatenate([decoder.step([part])[0] for part in parts])


@pytest.mark.parametrize(("kind", "weight_format"), [("qwen2", "int8"), ("qwen2", "int4"), ("qwen2_moe", "int4")])
def test_lowered_model_answers_as_the_dequantized_one(kind: Any, weight_format: Integer) -> None:
    config: dict[str, Any] = {"num_experts": 12, "num_experts_per_tok": 4} if kind == "qwen2_moe" else {}
    group = 16 if weight_format == "int4" else None
    model = _quantize_sites(portable_model(random_model(kind, **config)), weight_format, group)
    lowered = _exact(lower(model.clone(), "ort-cpu"))
    kinds = {node.op_type for node in lowered.graph}
    assert "MatMulNBits" in kinds and ("QMoE" in kinds) == (kind == "qwen2_moe")
    assert np.abs(_answers_of(lowered) - _answers_of(model)).max() < FLOAT32_MODEL


def test_projections_of_different_formats_are_not_packed() -> None:
    """Packed, neither would be stored as codes."""
    model = portable_model(random_model("qwen2"))
    for site in find_sites(model).linear.values():
        if site.name.endswith(("q_proj", "k_proj")):
            found = rounded(weights.transpose(site.weight, (1, 0)), "int8", weights.dims(site.weight)[0])
            set_weight(model, site.node, 1, weights.transpose(found.dequantized(), (1, 0)))
    lowered = lower(model, "ort-cpu")
    assert ops(lowered).count("MatMulNBits") == 2 * ops(lowered).count("GroupQueryAttention") > 0
    assert not [node.name for node in lowered.graph if "qkv_proj" in (node.name or "")]


@pytest.mark.parametrize(
    ("operator", "what"), [(QUANTIZED_ATTENTION, "8-bit key/value cache"), (QUANTIZED_EXPERTS, "FP8")]
)
def test_quantized_functions_are_refused_by_name(operator: str, what: str) -> None:
    model = portable_model(random_model("qwen2_moe"))
    kind = GROUPED_QUERY_ATTENTION if operator == QUANTIZED_ATTENTION else MIXTURE_OF_EXPERTS
    next(node for node in model.graph if node.op_type == kind).op_type = operator
    with pytest.raises(UnsupportedError, match=f"ort-cpu has no .*{what}"):
        lower(model, "ort-cpu")
