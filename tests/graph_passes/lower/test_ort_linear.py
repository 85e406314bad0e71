"""Products by weights as they are stored: linked weights, tied vocabulary projections, merged ones taken apart."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import rounded
from qwenforge.exporter.quantized_weights import QuantizedWeight, as_quantized, quantize
from qwenforge.graph_passes.lower.ort_linear import MatMulByStoredWeight, TiedVocabularyProjection
from qwenforge.graph_passes.lower.unmerge import UnmergeProjections, UnmergeQuantizedProjections
from support.small_graphs import answers, apply_rule, graph_from_text, normal, ops, relative_error
from support.tolerances import FLOAT32_EXACT

LINEAR = "(float[B,S,8] x) => (float[B,S,6] y) { y = MatMul(x, w) }"
SPLIT = """(float[B,S,8] x) => (float[B,S,6] a, float[B,S,6] b)
    { m = MatMul(x, w)  a, b = Split<axis = -1, num_outputs = 2>(m) }"""
TIED = "(int64[B,S] tokens) => (float[B,S,10] y) { x = Gather(table, tokens)  y = MatMul(x, w) }"


def _stored(*shape: int, seed: int = 0) -> ir.TensorProtocol:
    return ir.tensor(normal(*shape, seed=seed), name=f"stored.{seed}")


def test_transpose_of_a_stored_weight_moves_into_the_product() -> None:
    leaf = _stored(6, 8)
    model = graph_from_text(LINEAR, w=weights.transpose(leaf, [1, 0]))
    assert apply_rule(MatMulByStoredWeight(), model).matches == 1
    node = model.graph[0]
    assert (node.domain, node.op_type, node.name) == ("com.microsoft", "FusedMatMul", "y")
    assert node.inputs[1] is not None and node.inputs[1].const_value is leaf
    x = normal(2, 3, 8)
    assert relative_error(answers(model, x=x)[0], x @ leaf.numpy().T) < FLOAT32_EXACT


def test_weight_used_twice_is_held_once() -> None:
    text = "(float[B,S,8] x) => (float[B,S,8] y) { h = MatMul(x, w)  y = MatMul(h, w) }"
    model = graph_from_text(text, w=weights.transpose(_stored(8, 8), [1, 0]))
    assert apply_rule(MatMulByStoredWeight(), model).matches == 2
    assert len({id(node.inputs[1]) for node in model.graph}) == 1


@pytest.mark.parametrize("how", ["as used", "cast", "merged"])
def test_weight_that_is_not_the_stored_one_transposed_stays(how: str) -> None:
    leaf = _stored(6, 8)
    plans = {
        "as used": ir.tensor(normal(8, 6), name="w"),
        "cast": weights.cast(weights.transpose(ir.tensor(normal(6, 8, dtype=np.float16)), [1, 0]), ir.DataType.FLOAT),
        "merged": weights.concat([weights.transpose(weights.slice_(leaf, 0, i, i + 3), [1, 0]) for i in (3, 0)], 1),
    }
    model = graph_from_text(LINEAR, w=plans[how])
    rule = apply_rule(MatMulByStoredWeight(), model)
    assert rule.matches == 0 and "not stored transposed" in rule.failures[0] and ops(model) == ["MatMul"]


def test_products_without_a_weight_are_no_look_alikes() -> None:
    model = graph_from_text("(float[B,S,8] x, float[B,8,6] w) => (float[B,S,6] y) { y = MatMul(x, w) }")
    rule = apply_rule(MatMulByStoredWeight(), model)
    assert rule.matches == 0 and not rule.failures


def test_tied_projection_reads_the_embedding_table() -> None:
    table = _stored(10, 8)
    model = graph_from_text(TIED, table=table, w=weights.transpose(table, [1, 0]))
    assert apply_rule(TiedVocabularyProjection(), model).matches == 1
    assert ops(model) == ["Gather", "FusedMatMul"] and model.graph[1].inputs[1] is model.graph[0].inputs[0]
    tokens = np.array([[1, 9, 0]])
    assert relative_error(answers(model, tokens=tokens)[0], table.numpy()[tokens] @ table.numpy().T) < FLOAT32_EXACT


def test_tie_is_seen_through_a_common_cast() -> None:
    leaf = ir.tensor(normal(10, 8, dtype=np.float16), name="half")
    table = weights.cast(leaf, ir.DataType.FLOAT)
    head = weights.cast(weights.transpose(leaf, [1, 0]), ir.DataType.FLOAT)
    model = graph_from_text(TIED, table=table, w=head)
    assert apply_rule(TiedVocabularyProjection(), model).matches == 1


def test_untied_projection_of_the_same_shape_stays() -> None:
    model = graph_from_text(TIED, table=_stored(10, 8), w=weights.transpose(_stored(10, 8, seed=1), [1, 0]))
    assert apply_rule(TiedVocabularyProjection(), model).matches == 0 and ops(model) == ["Gather", "MatMul"]


def _merged() -> tuple[ir.TensorProtocol, list[ir.TensorProtocol]]:
    leaves = [_stored(6, 8, seed=seed) for seed in (1, 2)]
    return weights.concat([weights.transpose(leaf, [1, 0]) for leaf in leaves], 1), leaves


def test_merged_projection_becomes_one_product_a_part() -> None:
    plan, leaves = _merged()
    model = graph_from_text(SPLIT, w=plan)
    assert apply_rule(UnmergeProjections(), model).matches == 1
    assert ops(model) == ["MatMul", "MatMul"] and [value.name for value in model.graph.outputs] == ["a", "b"]
    x = normal(1, 4, 8)
    for found, leaf in zip(answers(model, x=x), leaves, strict=True):
        assert relative_error(found, x @ leaf.numpy().T) < FLOAT32_EXACT
    assert apply_rule(MatMulByStoredWeight(), model).matches == 2


SPLIT_SIZES = SPLIT.replace("<axis = -1, num_outputs = 2>(m)", "<axis = 2>(m, sizes)")
UNMERGED = {
    "the split cuts elsewhere": (SPLIT_SIZES, {"sizes": np.array([4, 8])}),
    "the split is of another axis": (SPLIT.replace("axis = -1", "axis = 1").replace("S,6", "R,12"), {}),
    "the product has another use": (
        SPLIT.replace("float[B,S,6] b)", "float[B,S,6] b, float[B,S,12] m)"),
        {},
    ),
    "the product is not split": ("(float[B,S,8] x) => (float[B,S,12] y) { m = MatMul(x, w)  y = Relu(m) }", {}),
}


@pytest.mark.parametrize("case", UNMERGED)
def test_merged_projection_stays_when(case: str) -> None:
    text, extra = UNMERGED[case]
    if case == "the split cuts elsewhere":
        text = text.replace("float[B,S,6] a, float[B,S,6] b", "float[B,S,4] a, float[B,S,8] b")
    model = graph_from_text(text, w=_merged()[0], **extra)
    before = ops(model)
    rule = apply_rule(UnmergeProjections(), model)
    assert rule.matches == 0 and "not split into its parts" in rule.failures[0] and ops(model) == before


def test_split_by_the_parts_sizes_is_taken_apart() -> None:
    model = graph_from_text(SPLIT_SIZES, w=_merged()[0], sizes=np.array([6, 6]))
    assert apply_rule(UnmergeProjections(), model).matches == 1 and ops(model) == ["MatMul", "MatMul"]


def _quantized(how: str) -> QuantizedWeight:
    """A merged matrix of 12 rows and 32 columns."""
    stored = _stored(12, 32)
    if how == "int4 with zero points":
        scales, points = ir.tensor(np.full((12, 2), 0.4, np.float32)), np.arange(24).reshape(12, 2) % 16
        wanted = ir.tensor(points.astype(ir.DataType.UINT4.numpy()))
        return quantize(stored, "uint4", scales, group_size=16, zero_points=wanted)
    return rounded(stored, "int8", 32) if how == "int8" else rounded(stored, "int4", 16)


QUANTIZED_SPLIT = SPLIT.replace("B,S,8", "B,S,32")


@pytest.mark.parametrize("sizes", [(6, 6), (4, 8)], ids=str)
@pytest.mark.parametrize("how", ["int8", "int4", "int4 with zero points"])
def test_parts_of_a_quantized_product_have_slices_of_its_codes(how: str, sizes: tuple[int, int]) -> None:
    merged = _quantized(how)
    text = QUANTIZED_SPLIT.replace("<axis = -1, num_outputs = 2>(m)", "<axis = 2>(m, sizes)")
    text = text.replace("float[B,S,6] a, float[B,S,6] b", f"float[B,S,{sizes[0]}] a, float[B,S,{sizes[1]}] b")
    plan = weights.transpose(merged.dequantized(), (1, 0))
    model = graph_from_text(text, w=plan, sizes=np.array(sizes))
    before = answers(model, x=normal(1, 4, 32))
    assert apply_rule(UnmergeQuantizedProjections(), model).matches == 1
    assert ops(model) == ["MatMul", "MatMul"] and [value.name for value in model.graph.outputs] == ["a", "b"]
    start = 0
    for node, rows in zip(model.graph, sizes, strict=True):
        assert node.inputs[1] is not None and node.inputs[1].const_value is not None
        part = as_quantized(weights.transpose(node.inputs[1].const_value, (1, 0)))
        assert part is not None and (part.format, part.group_size) == (merged.format, merged.group_size)
        cut = slice(start, start + rows)
        np.testing.assert_array_equal(part.codes.numpy(), merged.codes.numpy()[cut])
        np.testing.assert_array_equal(part.scales.numpy(), merged.scales.numpy()[cut])
        assert (part.zero_points is None) == (merged.zero_points is None)
        if part.zero_points is not None and merged.zero_points is not None:
            np.testing.assert_array_equal(part.zero_points.numpy(), merged.zero_points.numpy()[cut])
        start += rows
    for found, expected in zip(answers(model, x=normal(1, 4, 32)), before, strict=True):
        assert relative_error(found, expected) < FLOAT32_EXACT


@pytest.mark.parametrize(
    ("text", "quantized"),
    [
        (QUANTIZED_SPLIT, False),
        (QUANTIZED_SPLIT.replace("axis = -1", "axis = 1").replace("S,6", "R,12"), True),
        (QUANTIZED_SPLIT.replace("float[B,S,6] b)", "float[B,S,6] b, float[B,S,12] m)"), True),
    ],
    ids=["its weight is not quantized", "the split is of tokens", "the product has another use"],
)
def test_merged_product_stays_one_where(text: str, quantized: bool) -> None:
    matrix = _quantized("int8").dequantized() if quantized else _stored(12, 32)
    model = graph_from_text(text, w=weights.transpose(matrix, (1, 0)))
    before = ops(model)
    assert apply_rule(UnmergeQuantizedProjections(), model).matches == 0 and ops(model) == before
