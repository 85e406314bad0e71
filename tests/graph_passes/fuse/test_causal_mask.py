"""What a mask lets a query see, proven by computing it; masks that are nearly causal are told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.errors import GraphError
from qwenforge.graph_passes.fuse.causal_mask import CausalMask, prove_causal
from qwenforge.graph_passes.signature import detect_signature
from support.attention_graphs import PARTS, Geometry, attention_graph
from support.small_graphs import Array

SEEN = "seen$ = And(causal, padding)"
TRILU = """shape = Concat<axis = 0>(total, total)  ones = Expand(unit, shape)  lower = Trilu<upper = 0>(ones)
  cut = Slice(lower, old, total, n0)  causal = Cast<to = 9>(cut)"""
GATHERED = """rows_of = Shape<start = 0, end = 1>(input_ids)  count = Squeeze(rows_of)  row = Range(nought, count, one)
  tall = Unsqueeze(row, n1)  tall_more = Expand(tall, both)  wide = Expand(keys, both)
  pair = Concat<axis = -1>(tall_last, wide_last)  bits = GatherND(told, pair)  padding = Unsqueeze(bits, n1n2)"""
GATHERED = GATHERED.replace("pair =", "tall_last = Unsqueeze(tall_more, n2)  wide_last = Unsqueeze(wide, n2)  pair =")
GATHERED = GATHERED.replace("tall_more", "both = Concat<axis = 0>(rows_of, total)  tall_more", 1)
TOLD = "told = Cast<to = 9>(attention_mask)  "
POSITIONS = "line = Unsqueeze(position_ids, n1n3)  seen_all = LessOrEqual(keys, line)  seen$ = And(seen_all, padding)"
WEIGHED = "known$ = Cast<to = 1>(seen$)  missing$ = Sub(unit, known$)  mask$ = Mul(missing$, lowest)"
TWO_ADDED = """early$ = Where(causal, zero, lowest)  real$ = Where(padding, zero, lowest)  mask$ = Add(early$, real$)"""
ATTENDED = "any$ = Cast<to = 6>(near$)  most$ = ReduceMax(any$, n3)  some$ = Cast<to = 9>(most$)  none$ = Not(some$)"
UNMASKED_ROWS = f"near$ = And(causal, padding)  {ATTENDED}  seen$ = Or(near$, none$)"
GIVEN: dict[str, Array] = {
    "unit": np.array(1, np.float32),
    "old_lowest": np.array(-1e4, np.float32),
    "minus_infinity": np.array(-np.inf, np.float32),
    "small": np.array(-500, np.float32),
    "three": np.array(3),
    "table": np.tri(64, dtype=bool)[None, None],
    "heads": np.ones((1, 4, 1, 1), bool),
    "big": np.array(4096),
    "seven": np.array(7),
}


def _prove(geometry: Geometry | None = None, name: str = "mask0", **parts: Any) -> CausalMask:
    """What is found about the value ``name`` in the graph of ``geometry`` and ``parts``."""
    given = GIVEN | parts.pop("given", {})
    return _proven(attention_graph(geometry or Geometry(), given, **parts), name)


def _proven(model: ir.Model, name: str = "mask0") -> CausalMask:
    value = next(value for node in model.graph for value in node.outputs if value.name == name)
    return prove_causal(model, value, detect_signature(model))


@pytest.mark.parametrize("name", ["mask0", "seen0"], ids=["added", "boolean"])
@pytest.mark.parametrize("padded", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("window", [0, 1, 2, 5, 1400, 4096, 131_072])
def test_window_is_measured_with_a_past(window: int, padded: bool, name: str) -> None:
    assert _prove(Geometry(windows=(window,), padded=padded), name) == CausalMask(window)


@pytest.mark.parametrize("padded", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("window", [0, 1, 5, 1400])
def test_window_is_measured_without_a_past(window: int, padded: bool) -> None:
    assert _prove(Geometry(windows=(window,), padded=padded, past=False)) == CausalMask(window)


@pytest.mark.parametrize(
    ("past", "parts"), [(False, {}), (True, {"causal": TRILU})], ids=["no past", "a triangle of all keys"]
)
def test_window_too_long_to_be_tried_is_refused(past: bool, parts: dict[str, str]) -> None:
    with pytest.raises(GraphError, match=r"has the number 4096, .* export the graph with its cache"):
        _prove(Geometry(windows=(4096,), past=past), **parts)


@pytest.mark.parametrize("window", [0, 1, 1400])
def test_triangle_of_all_keys_is_tried_with_fewer(window: int) -> None:
    assert _prove(Geometry(windows=(window,)), causal=TRILU) == CausalMask(window)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("window", [0, 3])
def test_added_mask_of_16_bits_is_understood(window: int, kind: str) -> None:
    assert _prove(Geometry(windows=(window,), kind=kind)) == CausalMask(window)


FORMS: dict[str, dict[str, Any]] = {
    "greater or equal": {"causal": "causal = GreaterOrEqual(queries, keys)"},
    "not later": {"causal": "later = Greater(keys, queries)  causal = Not(later)"},
    "padding gathered": {"padding": TOLD + GATHERED},
    "positions of the tokens": {"seen": POSITIONS},
    "one minus, times the lowest": {"mask": WEIGHED},
    "two masks added": {"mask": TWO_ADDED},
    "minus ten thousand": {"mask": "mask$ = Where(seen$, zero, old_lowest)"},
    "minus infinity": {"mask": "mask$ = Where(seen$, zero, minus_infinity)"},
    "rows that see nothing see all": {"seen": UNMASKED_ROWS},
    "lengths of the embedded tokens": {"places": PARTS["places"].replace("(input_ids)", "(x0)")},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_causal(form: str) -> None:
    assert _prove(**FORMS[form]) == CausalMask(0)


NOT_CAUSAL = "the attention mask is not causal: with"
BIASED = "the attention mask adds something to the scores of visible keys"
CONTENTS = "the attention mask depends on what the tokens are"


def _near(nodes: str, kept: str) -> dict[str, str]:
    """Of the tokens so far, those that ``nodes`` keep."""
    return {"causal": f"before = LessOrEqual(keys, queries)  {nodes}  causal = And(before, {kept})"}


def _lines(nodes: str, lines: str) -> dict[str, str]:
    """Keys up to other numbers than the queries' places."""
    return {"causal": f"{nodes}  lines = Unsqueeze({lines}, n1)  causal = LessOrEqual(keys, lines)"}


def _also_added(nodes: str, extra: str) -> dict[str, str]:
    return {"mask": f"{nodes}  base = Where(seen$, zero, lowest)  mask$ = Add(base, {extra})"}


def _also_seen(nodes: str, condition: str) -> dict[str, str]:
    return {"seen": f"{nodes}  near = And(causal, padding)  seen$ = And(near, {condition})"}


RECENT = "oldest = Sub(queries, big)  near = Greater(keys, oldest)  "
CHUNK = "chunk = Div(keys, big)  own = Div(queries, big)  near = Equal(chunk, own)"
ODD = "odd = Equal(input_ids, seven)  even = Not(odd)  line = Unsqueeze(even, n1n3)"
LOOK_ALIKES: dict[str, tuple[dict[str, Any], str]] = {
    "everything": ({"causal": "causal = GreaterOrEqual(queries, nought)"}, NOT_CAUSAL),
    "nothing": ({"causal": "causal = Less(queries, nought)"}, NOT_CAUSAL),
    "one token ahead": ({"causal": "ahead = Add(queries, one)  causal = LessOrEqual(keys, ahead)"}, NOT_CAUSAL),
    "not itself": ({"causal": "causal = Less(keys, queries)"}, NOT_CAUSAL),
    "later tokens": ({"causal": "causal = GreaterOrEqual(keys, queries)"}, NOT_CAUSAL),
    "a prefix seen by all": (
        {"causal": "before = LessOrEqual(keys, queries)  prefix = Less(keys, three)  causal = Or(before, prefix)"},
        NOT_CAUSAL,
    ),
    "upper left": (_lines("count = Squeeze(new)  upper = Range(nought, count, one)", "upper"), NOT_CAUSAL),
    "the past alone": ({"causal": "causal = Less(keys, old)"}, NOT_CAUSAL),
    "the new tokens alone": (_near("fresh = GreaterOrEqual(keys, old)", "fresh"), NOT_CAUSAL),
    "padding unheeded": ({"seen": "seen$ = Unsqueeze(causal, n0n1)"}, NOT_CAUSAL),
    "padding inverted": ({"seen": "bare = Not(padding)  seen$ = And(causal, bare)"}, NOT_CAUSAL),
    "padding of the first row for all": (
        {"seen": "top = Slice(padding, n0, n1, n0)  seen$ = And(causal, top)"},
        NOT_CAUSAL,
    ),
    "chunks": (_near(CHUNK, "near"), NOT_CAUSAL),
    "a window and the first tokens": (
        _near(f"{RECENT} first_ones = Less(keys, three)  kept = Or(near, first_ones)", "kept"),
        NOT_CAUSAL,
    ),
    "every second token of a long context": (
        _near(f"{RECENT} odd = BitwiseAnd(keys, one)  some = Cast<to = 9>(odd)  kept = Or(near, some)", "kept"),
        NOT_CAUSAL,
    ),
    "a bias by distance": (
        {"mask": "far = Sub(keys, queries)  slope = Cast<to = 1>(far)  mask$ = Where(seen$, slope, lowest)"},
        BIASED,
    ),
    "a bias for all": ({"mask": "mask$ = Where(seen$, unit, lowest)"}, BIASED),
    "keys hidden a little": ({"mask": "mask$ = Where(seen$, zero, small)"}, BIASED),
    "nothing times minus infinity": ({"mask": WEIGHED.replace("lowest", "minus_infinity")}, BIASED),
    "token values": (_also_seen(ODD, "line"), CONTENTS),
    "embedded tokens": (_also_added("sum = ReduceSum(x0, n2)  line = Unsqueeze(sum, n1)", "line"), CONTENTS),
    "cached values": (_also_added("mean = ReduceMean<keepdims = 0>(past_value_0)", "mean"), CONTENTS),
    "a table of some lengths": (
        {"causal": "cut = Slice(table, old, total, n2)  causal = Slice(cut, n0, total, n3)"},
        "a part of the graph cannot be computed for other lengths than it was exported with",
    ),
    "a mask for each head": (_also_seen("", "heads"), "the attention mask is [2, 4, 6, 6], not [batch, 1, queries,"),
    "a flat mask": (
        {"mask": "mask$ = Where(causal, zero, lowest)"},
        "the attention mask is [6, 6], not [batch, 1, queries, keys]",
    ),
    "a mask of one more key": (
        {"mask": "base = Where(seen$, zero, lowest)  mask$ = Pad(base, behind)", "behind": [0, 0, 0, 0, 0, 0, 0, 1]},
        "the attention mask is [2, 1, 6, 7] where [2, 1, 6, 6] is expected",
    ),
    "positions of others": (
        {"inputs": "int64[S] cache_position", **_lines("", "cache_position")},
        "positions or mask depend on the graph input cache_position",
    ),
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alike_is_refused_and_told(case: str) -> None:
    parts, reason = LOOK_ALIKES[case]
    with pytest.raises(GraphError) as refusal:
        _prove(**parts)
    assert str(refusal.value).startswith(reason)


def test_constant_is_no_mask() -> None:
    model = attention_graph()
    value = model.graph.initializers["zero"]
    with pytest.raises(GraphError, match="the attention mask is a constant"):
        prove_causal(model, value, detect_signature(model))


def _fixed(model: ir.Model, batch: int | str = "B", past: int | str = "P", new: int | str = "S") -> ir.Model:
    """``model`` with inputs of fixed sizes."""
    for value in model.graph.inputs:
        assert value.shape is not None
        if value.name in ("input_ids", "position_ids"):
            value.shape = ir.Shape([batch, new])
        elif value.name == "attention_mask":
            both = isinstance(past, int) and isinstance(new, int)
            value.shape = ir.Shape([batch, int(past) + int(new) if both else "T"])
        else:
            value.shape = ir.Shape([batch, value.shape[1], past, value.shape[3]])
    return model


@pytest.mark.parametrize("window", [0, 3, 4096])
@pytest.mark.parametrize("sizes", [{"batch": 1}, {"batch": 2}, {"new": 1}, {"batch": 1, "new": 1}], ids=str)
def test_graph_of_fixed_sizes_is_tried_with_them(sizes: dict[str, int], window: int) -> None:
    model = _fixed(attention_graph(Geometry(windows=(window,)), GIVEN), **sizes)
    assert _proven(model) == CausalMask(window)


def test_chunks_are_told_from_a_window_one_token_at_a_time() -> None:
    parts, _ = LOOK_ALIKES["chunks"]
    with pytest.raises(GraphError, match=NOT_CAUSAL):
        _proven(_fixed(attention_graph(Geometry(), GIVEN, **parts), new=1))


@pytest.mark.parametrize("sizes", [{"batch": 3}, {"past": 5, "new": 3}], ids=str)
def test_graph_that_admits_no_trial_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(GraphError, match="the graph's fixed input shapes admit no trial of its attention mask"):
        _proven(_fixed(attention_graph(Geometry(), GIVEN), **sizes))
