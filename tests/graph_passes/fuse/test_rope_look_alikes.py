"""What resembles a rotary embedding, or tables of positions, and is none: it stays and is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwenforge.graph_passes.fuse.rope import FuseRotaryEmbedding
from support.rotary_graphs import (
    ANGLES,
    COMPUTED,
    COUNTED,
    HALF,
    LIFT,
    POSITIONS,
    ROTATE,
    ROTATION,
    SPLIT,
    SUM,
    TABLES,
    renamed,
    rotary_model,
)
from support.small_graphs import normal, ops

OTHER_HALF = "a negated half is joined to something that is not the other half of the same tensor"
UNKNOWN_HEAD = "the rotated tensor is not [batch, heads, sequence, head size] with a known head size"
ROTATIONS: dict[str, tuple[str, str]] = {
    "halves swapped": (ROTATION.replace("Neg(up)", "Neg(low)").replace("(neg, low)", "(neg, up)"), OTHER_HALF),
    "the same half twice": (ROTATION.replace("Neg(up)", "Neg(low)"), OTHER_HALF),
    "halves of two tensors": (
        f"other = Relu(k)  {SPLIT.replace('up = Slice(k,', 'up = Slice(other,')}  {ROTATE}  {SUM}",
        OTHER_HALF,
    ),
    "unequal parts": (ROTATION.replace("n4, n3, n1)", "n3, n3, n1)").replace("k, n4, far", "k, n3, far"), OTHER_HALF),
    "even and odd places": (
        ROTATION.replace(SPLIT, "low = Slice(k, n0, far, n3, n2)  up = Slice(k, n1, far, n3, n2)"),
        OTHER_HALF,
    ),
    "halves of the sequence": (
        ROTATION.replace(SPLIT, "low, up = Split<axis = 2, num_outputs = 2>(k)").replace("axis = -1", "axis = 2"),
        OTHER_HALF,
    ),
    "Split whose sizes are computed": (
        ROTATION.replace(
            SPLIT,
            "rows = Shape<start = 0, end = 1>(k)  none = Sub(rows, rows)  size = Add(none, n4)"
            "  two = Concat<axis = 0>(size, size)  low, up = Split<axis = -1>(k, two)",
        ),
        OTHER_HALF,
    ),
    "Slice without axes": (
        ROTATION.replace("(k, n0, n4, n3, n1)", "(k, starts, ends)").replace(
            "(k, n4, far, n3, n1)", "(k, later, everything)"
        ),
        OTHER_HALF,
    ),
    "the inverse rotation": (
        ROTATION.replace("Add(a, b)", "Sub(a, b)"),
        "rotate_half(x) * sin is not added to x * cos",
    ),
    "a sum with another tensor": (
        ROTATION.replace("a = Mul(k,", "other = Relu(k)  a = Mul(other,"),
        "rotate_half(x) * sin is not added to x * cos of the same x",
    ),
    "the rotated half used twice": (
        ROTATION.replace("Add(a, b)", "Sum(a, b, half)"),
        "rotate_half(x) is not multiplied by one table",
    ),
    "no axis of heads": (
        "mean = ReduceMean<keepdims = 0>(k, n1)  low, up = Split<axis = -1, num_outputs = 2>(mean)  "
        f"{ROTATE}  a = Mul(mean, c)  b = Mul(half, s)  turned = Add(a, b)  one_head = Unsqueeze(turned, n1)"
        "  present_key_0 = Concat<axis = 1>(one_head, one_head)",
        UNKNOWN_HEAD,
    ),
    "a shape that nobody knows": (
        "same = Reshape(k, anything)  low, up = Split<axis = -1, num_outputs = 2>(same)  "
        f"{ROTATE}  {renamed(SUM, k='same')}",
        UNKNOWN_HEAD,
    ),
}
WHOLE = {
    "starts": np.zeros(4, np.int64),
    "ends": np.array([9, 9, 99, HALF]),
    "later": np.array([0, 0, 0, HALF]),
    "everything": np.full(4, 99),
    "anything": np.zeros(4, np.int64),
}


@pytest.mark.parametrize("case", ROTATIONS)
def test_rotation_that_means_something_else_stays_and_is_told(case: str) -> None:
    rotation, reason = ROTATIONS[case]
    _stays(reason, rotation=rotation, **WHOLE)


def _stays(reason: str, **changes: Any) -> None:
    model = rotary_model(**changes)
    before, inputs = ops(model), list(model.graph.inputs)
    rule = FuseRotaryEmbedding(POSITIONS)
    rule(model)
    assert rule.matches == 0 and ops(model) == before and list(model.graph.inputs) == inputs
    assert len(rule.failures) == 1 and rule.failures[0].startswith(reason), rule.failures
    assert not [name for name in model.graph.initializers if name.startswith("rope.")]


def test_other_signs_are_no_look_alikes() -> None:
    """Concat(x[half:], -x[:half]) turns the other way; nothing is said of every Concat with a negated part."""
    model = rotary_model(ROTATION.replace("Neg(up)", "Neg(low)").replace("(neg, low)", "(up, neg)"))
    rule = FuseRotaryEmbedding(POSITIONS)
    rule(model)
    assert rule.matches == 0 and rule.failures == [] and "RotaryEmbedding" not in ops(model)


HALVES = f"{ANGLES}  c = Cos(angle)  s = Sin(angle)"
OPERATORS = {
    "interleaved": "present_key_0 = RotaryEmbedding<interleaved = 1>(k, c, s)",
    "a part of the head": "c2 = Slice(c, n0, n2, n2)  s2 = Slice(s, n0, n2, n2)"
    "  present_key_0 = RotaryEmbedding<rotary_embedding_dim = 4>(k, c2, s2)",
}


@pytest.mark.parametrize("case", OPERATORS)
def test_operator_that_rotates_otherwise_stays_and_is_told(case: str) -> None:
    reason = "the rotation is interleaved or covers only a part of the head"
    _stays(reason, rotation=OPERATORS[case], tables=HALVES)


def test_operator_on_joined_heads_stays_and_is_told() -> None:
    rotation = "turned = RotaryEmbedding<num_heads = 2>(joined, c, s)  again = Reshape(turned, heads)"
    rotation = f"all = Constant<value_ints = [0, 0, 16]>()  joined = Reshape(flat, all)  {rotation}"
    _stays(UNKNOWN_HEAD, rotation=f"{rotation}  present_key_0 = Transpose<perm = [0, 2, 1, 3]>(again)", tables=HALVES)


MORE = "cos and sin depend on more than the position (dynamic scaling is not supported)"
SPREAD = "cos and sin are not spread over the heads"
NO_SOURCE = "cos and sin are not computed from one tensor of integer positions"
NOT_THE_INPUT = "cos and sin are computed from positions that differ from position_ids"


def _scaled(nodes: str, product: str = "Mul(angle, scale)") -> str:
    """Tables of angles that ``nodes`` change further."""
    return f"{ANGLES}  {nodes}  changed = {product}  {renamed(TABLES, angle='changed')}  {LIFT}"


def _at(nodes: str) -> str:
    """Tables at the positions ``row`` that ``nodes`` compute."""
    return f"{nodes}  {renamed(COMPUTED, position_ids='row')}"


TABLES_OF_MORE: dict[str, tuple[str, str]] = {
    "interleaved angles": (
        COMPUTED.replace(
            "e = Concat<axis = -1>(angle, angle)",
            "deep = Unsqueeze(angle, n3)"
            "  pairs = Concat<axis = -1>(deep, deep)  flat_pairs = Constant<value_ints = [0, 0, 8]>()"
            "  e = Reshape(pairs, flat_pairs)",
        ),
        "the two halves of the cos and sin tables differ (interleaved rotation)",
    ),
    "the sequence scales": (
        _scaled("new = Shape<start = 1, end = 2>(input_ids)  scale = Cast<to = 1>(new)"),
        NO_SOURCE,
    ),
    "a long sequence scales": (
        _scaled(
            "new = Shape<start = 1, end = 2>(input_ids)  far_on = Greater(new, n8)  scale = Where(far_on, half_, one_)"
        ),
        MORE,
    ),
    "the largest position scales": (
        _scaled("scale = ReduceMax<keepdims = 1>(f)", "Div(angle, scale)"),
        MORE,
    ),
    "the largest position of the row scales": (_scaled("scale = ReduceMax(f, n2)", "Div(angle, scale)"), MORE),
    "the smallest position is taken off": (
        _scaled("least = ReduceMin(f, n2)", "Sub(angle, least)"),
        MORE,
    ),
    "the first row for all": (
        f"{ANGLES}  {TABLES}  c0 = Slice(c, n0, n1, n0)  s0 = Slice(s, n0, n1, n0)  {renamed(LIFT, c='c0', s='s0')}",
        MORE,
    ),
    "the token scales": (
        _scaled("each = Gather(of_tokens, input_ids)  scale = Unsqueeze(each, n2)"),
        "cos and sin depend on input_ids, not on the position alone",
    ),
    "the token instead of the position": (
        renamed(COMPUTED, position_ids="input_ids"),
        "cos and sin are computed from input_ids, which is not the positions",
    ),
    "positions counted from the tokens": (
        _at("some = Greater(input_ids, n0)  ones = Cast<to = 7>(some)  row = CumSum(ones, one)"),
        "cos and sin are computed from input_ids, which is not the positions",
    ),
    "the first row of positions": (_at("row = Slice(position_ids, n0, n1, n0)"), NOT_THE_INPUT),
    "positions up to a limit": (_at("row = Min(position_ids, n8)"), NOT_THE_INPUT),
    "positions shifted": (_at("row = Add(position_ids, n1)"), NOT_THE_INPUT),
    "positions gathered from tables": (
        f"c = Gather(some_cos, position_ids)  s = Gather(some_cos, position_ids)  {LIFT}",
        NO_SOURCE,
    ),
    "positions narrowed first": (
        renamed(COMPUTED, p="narrow")
        .replace("narrow = Un", "p = Un")
        .replace("f = ", "narrow = Cast<to = 6>(p)  f = "),
        NO_SOURCE,
    ),
    "a length of which positions are made": (
        f"new = Shape<start = 1, end = 2>(input_ids)  real = Cast<to = 1>(new)  to = Squeeze(real)"
        f"  row = Range(none_, to, one_)  both = Constant<value_ints = [0, 1]>()  p = Unsqueeze(row, both)"
        f"  {ANGLES.split('  ', 2)[2].replace('f)', 'p)')}  {TABLES}  {LIFT}",
        "the positions of cos and sin cannot be replaced: ",
    ),
    "sizes frozen": (
        f"{ANGLES}  size = Constant<value_ints = [2, 5, 4]>()  frozen = Reshape(angle, size)"
        f"  {renamed(TABLES, angle='frozen')}  {LIFT}",
        "the positions of cos and sin cannot be replaced: ",
    ),
    "tables without an axis for the heads": (f"{ANGLES}  {TABLES}  cos = Identity(c)  sin = Identity(s)", SPREAD),
    "tables for the axis of the heads": (
        f"{ANGLES}  {TABLES}  {LIFT.replace('n1', 'n2')}",
        SPREAD,
    ),
}


@pytest.mark.parametrize("case", TABLES_OF_MORE)
def test_tables_of_more_than_positions_stay_and_are_told(case: str) -> None:
    tables, reason = TABLES_OF_MORE[case]
    numbers = {"half_": 0.5, "one_": 1, "none_": 0}
    constants = "  ".join(f"{name} = Constant<value_float = {float(number)}>()" for name, number in numbers.items())
    given = {"of_tokens": 1 + normal(16), "some_cos": normal(POSITIONS, 8)}
    _stays(reason, tables=f"{constants}  {tables}", **given)


def test_scale_of_a_long_past_stays_and_is_told() -> None:
    nodes = "far_on = Greater(old, n8)  half_ = Constant<value_float = 0.5>()  one_ = Constant<value_float = 1.0>()"
    scaled = renamed(_scaled(f"{nodes}  scale = Where(far_on, half_, one_)"), position_ids="row")
    _stays(MORE, tables=f"{COUNTED}  {scaled}", past=True)


def test_positions_that_start_anew_behind_the_past_stay_and_are_told() -> None:
    counted = COUNTED.replace("Range(from, to, one)", "Range(none_, length, one)").replace(
        "counted =", "none_ = Constant<value_int = 0>()  length = Squeeze(new)  counted ="
    )
    tables = f"{counted}  {renamed(COMPUTED, position_ids='row')}"
    _stays("the graph's own positions do not count on from the cached tokens", tables=tables, past=True)
