"""Rotary embeddings in every form that exporters write, and the tables that all layers share."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.errors import GraphError
from qwenforge.graph_passes.execution import Executable
from qwenforge.graph_passes.fuse.rope import FuseRotaryEmbedding
from qwenforge.graph_passes.infra import RULE_TAG
from support.rotary_graphs import (
    ANGLES,
    COMPUTED,
    COUNTED,
    HALF,
    HEADS,
    LIFT,
    POSITIONS,
    ROTATE,
    ROTATION,
    SIZE,
    SPLIT,
    TABLES,
    plain_frequencies,
    renamed,
    rotary_feeds,
    rotary_model,
    rotated_keys,
    yarn_frequencies,
)
from support.small_graphs import answers, apply_rule, normal, ops, relative_error
from support.tolerances import BFLOAT16, FLOAT16, FLOAT32_REORDERED


def _fuse(model: ir.Model) -> ir.Node:
    """The only rotation of ``model``, after the rule has found it and nothing else."""
    rule = apply_rule(FuseRotaryEmbedding(POSITIONS), model)
    assert rule.failures == [] and rule.matches == 1
    assert not {"Neg", "Slice", "Split", "Cos", "Sin"} & set(ops(model))
    (node,) = (node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert node.metadata_props[RULE_TAG] == "rotary_embedding"
    return node


FORMS = {
    "slices": ROTATION,
    "slices by a named end": ROTATION.replace("far", "n8"),
    "Split in two": ROTATION.replace(SPLIT, "low, up = Split<axis = -1, num_outputs = 2>(k)"),
    "Split by sizes": ROTATION.replace(SPLIT, "low, up = Split<axis = 3>(k, sizes)"),
    "commuted": f"{SPLIT}  {ROTATE}  b = Mul(sin, half)  a = Mul(cos, k)  present_key_0 = Add(b, a)",
    "positive axis": ROTATION.replace("axis = -1", "axis = 3"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_node(form: str) -> None:
    model, feeds = rotary_model(FORMS[form]), rotary_feeds()
    expected = rotated_keys(feeds)
    assert relative_error(answers(model, **feeds)[1], expected) <= FLOAT32_REORDERED
    node = _fuse(model)
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    assert [value.name for value in node.inputs if value is not None][1:3] == ["rope.cos_cache", "rope.sin_cache"]
    assert node.inputs[3] is positions and node.outputs[0].name == "present_key_0"
    assert all(table.shape == ir.Shape([POSITIONS, HALF]) for table in node.inputs[1:3] if table is not None)
    assert relative_error(answers(model, **feeds)[1], expected) <= FLOAT32_REORDERED


@pytest.mark.parametrize("past", [0, 6])
def test_positions_counted_in_the_graph_become_an_input(past: int) -> None:
    model, feeds = rotary_model(tables=f"{COUNTED}  {renamed(COMPUTED, position_ids='row')}", past=True), rotary_feeds()
    feeds["position_ids"] = np.tile(past + np.arange(5), (2, 1))
    cache = {name: normal(2, HEADS, past, SIZE) for name in ("past_key_0", "past_value_0")}
    _fuse(model)
    assert [str(value.name) for value in model.graph.inputs] == ["input_ids", *cache, "position_ids"]
    turned = answers(model, **feeds, **cache)[1][:, :, past:]
    assert relative_error(turned, rotated_keys(feeds)) <= FLOAT32_REORDERED


TABLE_FORMS = {
    "a broadcast product": (
        "p = Unsqueeze(position_ids, n2)  f = Cast<to = 1>(p)  angle = Mul(f, flat_freq)",
        {"flat_freq": plain_frequencies().astype(np.float32)},
    ),
    "a cast in front": (
        "p = Cast<to = 1>(position_ids)  f = Unsqueeze(p, n1)  m = MatMul(inv_freq, f)"
        "  angle = Transpose<perm = [0, 2, 1]>(m)",
        {},
    ),
    "frequencies expanded over the rows": (
        "rows = Shape<start = 0, end = 1>(position_ids)  size = Concat<axis = 0>(rows, n4, n1)  "
        "every = Expand(inv_freq, size)  " + renamed(ANGLES, inv_freq="every"),
        {},
    ),
    "positions viewed in another shape": (
        "size = Shape(input_ids)  row = Reshape(position_ids, size)  " + renamed(ANGLES, position_ids="row"),
        {},
    ),
}


@pytest.mark.parametrize("form", TABLE_FORMS)
def test_tables_are_read_off_whatever_computes_them(form: str) -> None:
    angles, given = TABLE_FORMS[form]
    model, feeds = rotary_model(tables=f"{angles}  {TABLES}  {LIFT}", **given), rotary_feeds()
    _fuse(model)
    assert relative_error(answers(model, **feeds)[1], rotated_keys(feeds)) <= FLOAT32_REORDERED


def test_yarn_tables_carry_the_attention_factor() -> None:
    """Frequencies by parts, and cos and sin times 0.1 ln(factor) + 1."""
    factor = 0.1 * np.log(4.0) + 1
    scaled = renamed(TABLES, c="c0", s="s0") + "  c = Mul(c0, mscale)  s = Mul(mscale, s0)"
    frequencies = yarn_frequencies()
    given = {"inv_freq": frequencies.astype(np.float32)[None, :, None], "mscale": np.array([factor], np.float32)}
    model, feeds = rotary_model(tables=f"{ANGLES}  {scaled}  {LIFT}", **given), rotary_feeds()
    node = _fuse(model)
    assert node.inputs[1] is not None and node.inputs[1].const_value is not None
    assert node.inputs[1].const_value.numpy()[0] == pytest.approx(factor)
    expected = rotated_keys(feeds, frequencies=frequencies, factor=factor)
    assert relative_error(answers(model, **feeds)[1], expected) <= FLOAT32_REORDERED


CASTS = {
    "before they are lifted": "c16 = Cast<to = {0}>(c)  s16 = Cast<to = {0}>(s)  " + renamed(LIFT, c="c16", s="s16"),
    "after they are lifted": renamed(LIFT, cos="c4", sin="s4") + "  cos = Cast<to = {0}>(c4)  sin = Cast<to = {0}>(s4)",
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_tables_stay_fp32_behind_a_cast_to_16_bits(kind: str, cast: str) -> None:
    """bf16 by ONNX's reference implementation: ONNX Runtime has few bf16 kernels."""
    from onnx.reference import ReferenceEvaluator

    dtype, code, bound = {"float16": (np.float16, 10, FLOAT16), "bfloat16": (ml_dtypes.bfloat16, 16, BFLOAT16)}[kind]
    model, feeds = rotary_model(tables=f"{ANGLES}  {TABLES}  {CASTS[cast].format(code)}", kind=kind), rotary_feeds()
    node = _fuse(model)
    assert [value.dtype for value in node.inputs if value is not None][:3] == [
        ir.DataType.from_numpy(np.dtype(dtype))
    ] * 3
    assert all(model.graph.initializers[f"rope.{name}_cache"].dtype == ir.DataType.FLOAT for name in ("cos", "sin"))
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    result = answers(model, **feeds)[1] if kind == "float16" else np.asarray(evaluator.run(None, feeds)[1])
    assert relative_error(result, rotated_keys(feeds, dtype)) <= bound


def test_layers_share_one_pair_of_tables_and_another_base_has_its_own() -> None:
    """Two rotations lift the same cos and sin by themselves; a third one has other frequencies."""
    names = "p f m angle e c s low up neg half a b cos sin present_key_0".split()
    again = renamed(f"{LIFT}  {ROTATION}", **{name: f"{name}_1" for name in names[7:]})
    other = renamed(f"{COMPUTED}  {ROTATION}", **{name: f"{name}_2" for name in names}, inv_freq="slow")
    first = renamed(ROTATION, present_key_0="present_key_0_0")
    total = "present_key_0 = Sum(present_key_0_0, present_key_0_1, present_key_0_2)"
    joined = f"{first}  {again}  {other}  {total}"
    slower = plain_frequencies() / 2
    model, feeds = rotary_model(joined, slow=slower.astype(np.float32)[None, :, None]), rotary_feeds()
    rule = apply_rule(FuseRotaryEmbedding(POSITIONS), model)
    assert rule.failures == [] and rule.matches == 3
    tables = sorted(name for name in model.graph.initializers if name.startswith("rope."))
    assert tables == ["rope.cos_cache", "rope.cos_cache_1", "rope.sin_cache", "rope.sin_cache_1"]
    expected = 2 * rotated_keys(feeds) + rotated_keys(feeds, frequencies=slower)
    assert relative_error(answers(model, **feeds)[1], expected) <= FLOAT32_REORDERED


OPERATOR = "present_key_0 = RotaryEmbedding(k, c, s)"
HALVES = f"{ANGLES}  c = Cos(angle)  s = Sin(angle)"


def test_operator_over_tables_of_its_own_is_given_shared_ones() -> None:
    model, feeds = rotary_model(OPERATOR, HALVES), rotary_feeds()
    _fuse(model)
    assert relative_error(answers(model, **feeds)[1], rotated_keys(feeds)) <= FLOAT32_REORDERED
    again = apply_rule(FuseRotaryEmbedding(POSITIONS), model)
    assert again.matches == 0 and again.failures == []


def test_exchanged_tables_stay_exchanged() -> None:
    """x * sin + rotate_half(x) * cos is no rotation by these angles, and what it is stays."""
    model, feeds = rotary_model(renamed(ROTATION, cos="sin", sin="cos")), rotary_feeds()
    expected = answers(model, **feeds)[1]
    _fuse(model)
    assert relative_error(answers(model, **feeds)[1], expected) <= FLOAT32_REORDERED


def test_rotation_of_a_part_of_the_head_leaves_the_rest_alone() -> None:
    part = "part = Slice(k, n0, n4, n3, n1)  rest = Slice(k, n4, far, n3, n1)"
    rotated = renamed(ROTATION, k="part", n2="n1", n4="n2", present_key_0="turned")
    joined = f"{part}  {rotated}  present_key_0 = Concat<axis = -1>(turned, rest)"
    model, feeds = rotary_model(joined, inv_freq=plain_frequencies()[None, :2, None].astype(np.float32)), rotary_feeds()
    expected = answers(model, **feeds)[1]
    assert apply_rule(FuseRotaryEmbedding(POSITIONS), model).matches == 1
    node = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert node.inputs[0] is not None and node.inputs[0].name == "part"
    assert relative_error(answers(model, **feeds)[1], expected) <= FLOAT32_REORDERED


@pytest.mark.parametrize("positions", [1, 2, 4, 33])
def test_few_positions_have_small_tables_and_a_later_one_is_refused(positions: int) -> None:
    model, feeds = rotary_model(), rotary_feeds(rows=1, new=1)
    assert apply_rule(FuseRotaryEmbedding(positions), model).matches == 1
    feeds["position_ids"] = np.array([[positions - 1]])
    assert relative_error(answers(model, **feeds)[1], rotated_keys(feeds)) <= FLOAT32_REORDERED
    with pytest.raises(GraphError, match="position"):
        Executable(model).run(feeds | {"position_ids": np.array([[positions]])}, ["present_key_0"])
