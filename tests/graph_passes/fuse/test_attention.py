"""Attention in every form that exporters write, with its cache; look-alikes stay and are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import names
from qwenforge.graph_passes.fuse.attention import FuseGroupedQueryAttention
from qwenforge.graph_passes.infra import RULE_TAG
from qwenforge.graph_passes.signature import detect_signature
from qwenforge.graph_passes.verify import verify_rewrite
from support.attention_graphs import (
    CACHE,
    EAGER,
    JOIN,
    KEY,
    MIXED,
    OP,
    QUERY,
    REPEAT,
    SCORES,
    SOFTMAX,
    TURNED,
    Geometry,
    attention_graph,
    expected_logits,
    fused_logits,
    unrepeated,
)
from support.small_graphs import Array, apply_rule, normal, ops, relative_error
from support.tolerances import FLOAT16, FLOAT32_REORDERED

STEPS = [[[3, 1, 4, 1, 5], [9, 2]], [[6], [5]], [[3, 5], [8, 9, 7]]]
"""Rows of unequal lengths: a prefill, a decode, several tokens against a part-filled cache."""


def _fuse(model: ir.Model) -> list[ir.Node]:
    """The fused nodes, after the rule has found each layer and nothing else; the graph is valid."""
    import onnx

    rule = apply_rule(FuseGroupedQueryAttention(), model)
    assert rule.failures == []
    nodes = [node for node in model.graph if node.op_type == "GroupedQueryAttention"]
    assert rule.matches == len(nodes) > 0
    assert not {"Softmax", "Attention", "RotaryEmbedding"} & set(ops(model))
    assert all(node.metadata_props[RULE_TAG] == "grouped_query_attention" for node in nodes)
    onnx.checker.check_model(ir.to_proto(model))
    return nodes


def _check(geometry: Geometry, model: ir.Model, tolerance: float = FLOAT32_REORDERED) -> list[ir.Node]:
    """Fuse ``model``; it computes what it did, and what the definition says."""
    before = model.clone()
    nodes = _fuse(model)
    for node, window in zip(nodes, geometry.windows, strict=True):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        assert attributes.pop("scale") == pytest.approx(geometry.scale, rel=1e-3)
        heads = {"num_heads": geometry.query_heads, "num_key_value_heads": geometry.kv_heads}
        assert attributes == {**heads, "sliding_window": window} and node.domain == names.DOMAIN
    outcome = verify_rewrite(before, model)
    assert outcome.ok, outcome.summary()
    for row, logits in enumerate(fused_logits(model, STEPS)):
        tokens = [token for step in STEPS for token in step[row]]
        assert relative_error(logits, expected_logits(geometry, tokens)) <= tolerance
    return nodes


@pytest.mark.parametrize("padded", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("past", [True, False], ids=["past", "prefill"])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads"), [(4, 2), (2, 2), (3, 1), (1, 1)], ids="grouped equal one_shared one".split()
)
def test_every_geometry_is_one_node(query_heads: int, kv_heads: int, past: bool, padded: bool) -> None:
    geometry = Geometry(query_heads, kv_heads, past=past, padded=padded)
    _check(geometry, attention_graph(geometry))


BOOLEAN = {"mask": "mask$ = Identity(seen$)"}
FLAT_KEY = """sizes$ = Shape(keys$)  length$ = Slice(sizes$, n2, n3)  front$ = Slice(sizes$, n0, n2)
  flat_shape$ = Concat<axis = 0>(minus_one, length$, n4)  flat$ = Reshape(keys$, flat_shape$)
  flipped$ = Transpose<perm = [0, 2, 1]>(flat$)  whole$ = Concat<axis = 0>(front$, n4, length$)
  turned$ = Reshape(flipped$, whole$)"""
PLAIN = "products$ = MatMul(query$, turned$)  scores$ = Add(products$, mask$)"
GUARDED = "bad$ = IsNaN(weights$)  kept$ = Where(bad$, zero, weights$)  mixed$ = MatMul(kept$, values$)"
COUNT = "counted$ = Cast<to = 1>(seen$)  count$ = ReduceSum<keepdims = 1>(counted$, minus_one)"
UNATTENDED = f"{COUNT}  blind$ = Less(count$, unit)  clean$ = Where(blind$, zero, mixed$)"
TORCHLIB = EAGER.replace(TURNED, FLAT_KEY).replace(MIXED, GUARDED)
BOTH_SCALED = TORCHLIB.replace(
    SCORES,
    "sq$ = Mul(query$, root)  sk$ = Mul(turned$, root)  products$ = MatMul(sq$, sk$)  scores$ = Add(products$, mask$)",
)
CLEAN_JOIN = JOIN.replace("(mixed$)", "(clean$)")
SCALE_ON_QUERY = EAGER.replace(SCORES, f"sq$ = Mul(query$, scale)  {PLAIN.replace('query$', 'sq$')}")
SCALE_ON_KEY = EAGER.replace(SCORES, f"sk$ = Mul(turned$, scale)  {PLAIN.replace('turned$', 'sk$')}")
FORMS: dict[str, dict[str, Any]] = {
    "scale commuted": {"attention": EAGER.replace("Mul(products$, scale)", "Mul(scale, products$)")},
    "divided": {"attention": EAGER.replace("Mul(products$, scale)", "Div(products$, divisor)")},
    "mask first": {"attention": EAGER.replace("Add(scaled$, mask$)", "Add(mask$, scaled$)")},
    "scale on the query": {"attention": SCALE_ON_QUERY},
    "scale on the key": {"attention": SCALE_ON_KEY},
    "query divided": {"attention": SCALE_ON_QUERY.replace("Mul(query$, scale)", "Div(query$, divisor)")},
    "scale before the query": {"attention": SCALE_ON_QUERY.replace("Mul(query$, scale)", "Mul(scale, query$)")},
    "softmax over axis 3": {"attention": EAGER.replace("axis = -1", "axis = 3")},
    "caches concatenated on axis -2": {"cache": CACHE.replace("axis = 2", "axis = -2")},
    "torchlib": {"attention": BOTH_SCALED},
    "torchlib, rows that see nothing": {"attention": f"{BOTH_SCALED}  {UNATTENDED}", "join": CLEAN_JOIN},
    "eager, rows that see nothing": {"attention": f"{EAGER}  {UNATTENDED}", "join": CLEAN_JOIN},
    "Attention": {"attention": OP, **BOOLEAN},
    "Attention, rows that see nothing": {"attention": f"{OP}  {UNATTENDED}", "join": CLEAN_JOIN, **BOOLEAN},
    "Attention, added mask": {"attention": OP},
    "Attention, heads not repeated": {**unrepeated(OP), **BOOLEAN},
    "joined in two steps": {
        "join": f"{JOIN.replace('(apart$', '(again$')}  ".replace(
            "joined$", "again$ = Reshape(apart$, q_shape)  joined$"
        )
    },
    "heads joined by what is left": {"width": [0, 0, -1]},
}


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed heads"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_node(form: str, normed: bool) -> None:
    geometry = Geometry(normed=normed)
    _check(geometry, attention_graph(geometry, {"unit": np.array(1, np.float32)}, **FORMS[form]))


def test_attention_without_scale_takes_the_head_size() -> None:
    (node,) = _fuse(attention_graph(Geometry(size=16), attention=OP.replace("<scale = 0.4>", ""), **BOOLEAN))
    assert node.attributes["scale"].as_float() == pytest.approx(0.25)


@pytest.mark.parametrize("past", [True, False], ids=["past", "prefill"])
@pytest.mark.parametrize("windows", [(3,), (1,), (0, 4), (2, 0, 5)], ids=str)
def test_each_layer_has_its_own_window(windows: tuple[int, ...], past: bool) -> None:
    geometry = Geometry(windows=windows, past=past)
    _check(geometry, attention_graph(geometry))


IN_FP32 = "up$ = Cast<to = 1>(scores$)  soft$ = Softmax<axis = -1>(up$)  weights$ = Cast<to = 10>(soft$)"


@pytest.mark.parametrize(
    "attention",
    [EAGER, EAGER.replace(SOFTMAX, IN_FP32), BOTH_SCALED, OP],
    ids=["plain", "softmax in fp32", "torchlib", "Attention"],
)
def test_half_precision_is_fused(attention: str) -> None:
    geometry = Geometry(kind="float16")
    (node,) = _check(geometry, attention_graph(geometry, attention=attention), FLOAT16)
    assert all(value is not None and value.dtype == ir.DataType.FLOAT16 for value in (*node.inputs[3:7], *node.outputs))


def test_signature_is_a_cache_in_place() -> None:
    geometry = Geometry(windows=(0, 0))
    model = attention_graph(geometry)
    _fuse(model)
    signature = detect_signature(model)
    assert signature.form == "in_place" and signature.cache_position == names.CACHE_POSITION
    assert signature.attention_mask is None and signature.position_ids == names.POSITION_IDS
    shape = ir.Shape([names.BATCH, geometry.kv_heads, names.CAPACITY, geometry.size])
    for layer, cache in enumerate(signature.layers):
        assert (cache.key_input, cache.value_input) == (names.past_key(layer), names.past_value(layer))
        assert (cache.key_output, cache.value_output) == (names.present_key(layer), names.present_value(layer))
    caches = [value for value in (*model.graph.inputs, *model.graph.outputs) if str(value.name).startswith("p")]
    assert [value.shape for value in caches if value.name != names.POSITION_IDS] == [shape] * 8


def test_fused_node_reads_the_projections_and_is_named_after_its_layer() -> None:
    model = attention_graph(Geometry(windows=(0, 0)))
    for node in model.graph:
        if node.op_type == "Reshape" and str(node.name).startswith("joined"):
            node.outputs[0].name = f"model.layers.{str(node.name)[-1]}.self_attn.view"
    for layer, node in enumerate(_fuse(model)):
        assert node.name == f"model.layers.{layer}.self_attn.attention"
        read = [value.name for value in node.inputs if value is not None]
        projected = [f"{role}_flat{layer}" for role in "qkv"]
        past = [names.past_key(layer), names.past_value(layer)]
        assert read == [*projected, *past, "cos", "sin", names.POSITION_IDS, names.CACHE_POSITION]
    assert (names.DOMAIN, "GroupedQueryAttention", "") in model.functions


def test_fused_graph_is_left_as_it_is() -> None:
    model = attention_graph()
    _fuse(model)
    before = ops(model)
    again = apply_rule(FuseGroupedQueryAttention(), model)
    assert again.matches == 0 and again.failures == [] and ops(model) == before


def _eager(*edits: tuple[str, str], then: str = "", **parts: Any) -> dict[str, Any]:
    """The parts of a graph whose eager attention is edited and followed by ``then``."""
    text = EAGER
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return {"attention": f"{text}  {then}", **parts}


def _guarded(old: str, new: str) -> dict[str, Any]:
    """Eager attention whose output is zero where something else than a causal mask says so."""
    assert old in UNATTENDED
    return _eager(then=UNATTENDED.replace(old, new), join=CLEAN_JOIN)


def _rotated(attributes: str, cos: str = "cos", sin: str = "sin") -> dict[str, str]:
    texts = {"query": QUERY, "key": KEY}
    return {
        name: text.replace("(", f"<{attributes}>(").replace("cos, sin", f"{cos}, {sin}") for name, text in texts.items()
    }


def _end(nodes: str) -> dict[str, str]:
    """Logits that depend on ``more``."""
    return {"end": f"{nodes}  x_more = Add(x_last, more)  logits = MatMul(x_more, head)"}


BEFORE_WEIGHTS, BEFORE_MIXED = "weights$ =", "mixed$ ="
COUNTED = """from_nought = Range(nought, last, one)  spot = Slice(from_nought, old, total)  lines = Unsqueeze(spot, n0)
  like = Shape(input_ids)  counted = Expand(lines, like)  """
UPPER = "count = Squeeze(new)  upper = Range(nought, count, one)  lines = Unsqueeze(upper, n1)"
ODD = "odd = Equal(input_ids, seven)  even = Not(odd)  line = Unsqueeze(even, n1n3)  near = And(causal, padding)"
SLOPE = "far$ = Sub(keys, queries)  slope$ = Cast<to = 1>(far$)"
MIXED_KEY = FLAT_KEY.replace("flat_shape$ =", "rows$ = Slice(sizes$, n0, n1)  flat_shape$ =")
MIXED_KEY = MIXED_KEY.replace("(minus_one, length$, n4)", "(rows$, minus_one, n4)")
TILES = "keys$ = Tile(present_key_$, copies)  values$ = Tile(present_value_$, copies)"
EXCHANGED = REPEAT.replace("present_key", "p").replace("present_value", "present_key").replace("(p_", "(present_value_")
OTHER_COUNT = "ids$ = Cast<to = 1>(input_ids)  four$ = Unsqueeze(ids$, n1n3)  count$ = ReduceSum(four$, minus_one)"
SIX = "lone$ = Unsqueeze(present_value_$, n2)  wide$ = Expand(lone$, groups)  six$ = Reshape(wide$, six_wide)"
NOT_CACHE = "the attended keys and values are not a cache that the graph returns"
NOT_CAUSAL = "the attention mask is not causal: with"
CONTENTS = "the attention mask depends on what the tokens are"
NO_MASK = "the scores have no mask added before a softmax over the keys"
NOT_TRANSPOSED = "the query is not multiplied by a transposed key"
OTHER_TABLES = "query and key are rotated by different tables or positions"
PARTLY_ROTATED = "the query is rotated in pairs or in part"
NOT_APPENDED = "the new tokens are not appended behind the cached ones"
NOT_GROWING = "the cache does not grow by concatenation along the sequence"
NO_SCORES = "the softmax is not over query @ key^T plus a mask"
NO_VALUES = "the softmax is not multiplied by the values"
UNKNOWN_GUARD = "the attention output is replaced by zero under an unknown condition"
NOT_BACK = "the attention output is not transposed back to [batch, sequence, heads, head size]"
KEYS_READ = "graph input past_key_0 has a use besides attention"
LOOK_ALIKES: dict[str, tuple[dict[str, Any], str]] = {
    "a mask that hides nothing": ({"causal": "causal = GreaterOrEqual(queries, nought)"}, NOT_CAUSAL),
    "a mask aligned at the upper left": ({"causal": f"{UPPER}  causal = LessOrEqual(keys, lines)"}, NOT_CAUSAL),
    "a constant mask": (_eager(("mask$", "zero"), mask=""), "the attention mask is a constant"),
    "a mask of token values": ({"seen": f"{ODD}  seen$ = And(near, line)"}, CONTENTS),
    "a bias added with the mask": (
        {"mask": f"{SLOPE}  mask$ = Where(seen$, slope$, lowest)"},
        "the attention mask adds something to the scores of visible keys",
    ),
    "no mask": (_eager(("(scores$)", "(scaled$)")), NO_MASK),
    "softmax over the queries": (_eager(("axis = -1", "axis = 2")), NO_MASK),
    "a key not transposed": (
        _eager((TURNED, "turned$ = Reshape(keys$, upright)"), upright=[0, 4, 4, -1]),
        NOT_TRANSPOSED,
    ),
    "a key transposed across heads": (_eager((TURNED, MIXED_KEY)), NOT_TRANSPOSED),
    "heads tiled": (
        {"repeat": REPEAT.replace("n2", "n1").replace("groups", "copies"), "copies": [1, 2, 1, 1, 1]},
        "the heads are repeated along another axis than next to the key/value head",
    ),
    "heads tiled by Tile": ({"repeat": TILES, "copies": [1, 2, 1, 1]}, NOT_CACHE),
    "keys and values exchanged": ({"repeat": EXCHANGED}, NOT_CACHE),
    "other tables for the key": ({"key": KEY.replace("cos", "sin_")}, OTHER_TABLES),
    "other positions for the key": (
        {"key": f"next = Add(position_ids, n1)  {KEY.replace('position_ids', 'next')}"},
        OTHER_TABLES,
    ),
    "an unrotated key": ({"key": "key$ = Identity(k_heads$)"}, "the key is not rotated by a RotaryEmbedding"),
    "an unrotated query": ({"query": "query$ = Identity(q_heads$)"}, "the query is not rotated by a RotaryEmbedding"),
    "pairs rotated": (_rotated("interleaved = 1"), PARTLY_ROTATED),
    "a part rotated": (_rotated("rotary_embedding_dim = 2", "cos_", "sin_"), PARTLY_ROTATED),
    "positions counted from the cache": (
        {"query": COUNTED + QUERY.replace("position_ids", "counted"), "key": KEY.replace("position_ids", "counted")},
        KEYS_READ,
    ),
    "new keys in front": ({"cache": CACHE.replace("past_key_$, key$", "key$, past_key_$")}, NOT_APPENDED),
    "new values in front": ({"cache": CACHE.replace("past_value_$, v_heads$", "v_heads$, past_value_$")}, NOT_APPENDED),
    "cache joined along the batch": ({"cache": CACHE.replace("axis = 2", "axis = 0")}, NOT_GROWING),
    "keys appended twice": ({"cache": CACHE.replace("(past_key_$, key$)", "(past_key_$, key$, key$)")}, NOT_GROWING),
    "capped scores": (_eager(("Add(scaled$", "Add(low$"), ("scores$ =", "low$ = Tanh(scaled$)  scores$ =")), NO_SCORES),
    "capped masked scores": (
        _eager((BEFORE_WEIGHTS, "low$ = Tanh(scores$)  weights$ ="), ("-1>(scores$)", "-1>(low$)")),
        NO_MASK,
    ),
    "a scale for each head": (_eager(("scale)", "scales)")), NO_SCORES),
    "Attention with softcap": (
        {"attention": OP.replace("scale = 0.4", "softcap = 20.0"), **BOOLEAN},
        "the Attention op uses softcap",
    ),
    "Attention with is_causal": (
        {"attention": "mixed$ = Attention<is_causal = 1>(query$, keys$, values$)"},
        "the Attention op has no mask of its own",
    ),
    "weights dropped": (
        _eager((MIXED, "kept$ = Where(keep, weights$, zero)  mixed$ = MatMul(kept$, values$)")),
        NO_VALUES,
    ),
    "weights made ones": (
        _eager((MIXED, GUARDED.replace("zero", "unit"))),
        "the softmax is replaced by something other than zero where it is not a number",
    ),
    "weights used twice": (
        _eager((BEFORE_MIXED, "more$ = MatMul(weights$, values$)  once$ ="), then="mixed$ = Add(once$, more$)"),
        "the softmax has an unexpected second use",
    ),
    "weights multiplied by something else": (
        _eager((MIXED, "more$ = Relu(weights$)  mixed$ = MatMul(more$, values$)")),
        NO_VALUES,
    ),
    "output zeroed for a token": (_guarded(COUNT, OTHER_COUNT), UNKNOWN_GUARD),
    "output zeroed for unseen keys": (_guarded("counted$, minus_one", "counted$, n2"), UNKNOWN_GUARD),
    "output zeroed for short rows": (_guarded("unit)", "few)"), UNKNOWN_GUARD),
    "output zeroed by another mask": (_guarded("Cast<to = 1>(seen$)", "Cast<to = 1>(padding)"), NOT_CAUSAL),
    "output used twice": (
        {"join": f"other$ = Relu(mixed$)  more$ = Add(mixed$, other$)  {JOIN.replace('(mixed$)', '(more$)')}"},
        NOT_BACK,
    ),
    "output not transposed back": ({"join": "joined$ = Reshape(mixed$, flat)", "flat": [0, -1, 16]}, NOT_BACK),
    "cached keys read elsewhere": (_end("more = ReduceMean<keepdims = 0>(past_key_0)"), KEYS_READ),
    "returned keys read elsewhere": (_end("more = ReduceMean<keepdims = 0>(present_key_0)"), KEYS_READ),
    "the padding mask read elsewhere": (
        _end("marks = Cast<to = 1>(attention_mask)  more = ReduceMean<keepdims = 0>(marks)"),
        "graph input attention_mask has a use besides attention",
    ),
    "another cache_position": (
        {"inputs": "int64[S] cache_position"},
        "the graph has an input cache_position of its own",
    ),
    "values of another size": (
        _eager(
            (MIXED, f"{SIX}  mixed$ = MatMul(weights$, six$)"),
            value_cache="float[B,2,%s,6]",
            v_shape=[0, 0, 2, 6],
            six_wide=[0, 4, -1, 6],
            width=[0, 0, 24],
        ),
        "query, key and value have different head sizes",
    ),
    "fewer values than keys": (
        _eager(("values$", "present_value_$"), value_cache="float[B,1,%s,4]", v_shape=[0, 0, 1, 4]),
        "4 query heads cannot share 2 key and 1 value heads",
    ),
}
GIVEN: dict[str, Array] = {
    "seven": np.array(7),
    "unit": np.array(1, np.float32),
    "few": np.array(3, np.float32),
    "sin_": normal(64, 2),
    "scales": 1 + normal(4, 1, 1) / 4,
    "keep": np.array([True, False, True, True]).reshape(1, 4, 1, 1),
}
SPECIAL: dict[str, dict[str, Array]] = {
    "a part rotated": {"cos_": normal(64, 1), "sin_": normal(64, 1)},
    "values of another size": {"wv0": normal(12, 12), "wo0": normal(24, 12)},
    "fewer values than keys": {"wv0": normal(12, 4)},
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alike_stays_and_is_told(case: str) -> None:
    parts, reason = LOOK_ALIKES[case]
    model = attention_graph(Geometry(), GIVEN | SPECIAL.get(case, {}), **parts)
    before, inputs = ops(model), list(model.graph.inputs)
    rule = FuseGroupedQueryAttention()
    rule(model)
    assert rule.matches == 0 and len(rule.failures) == 1 and rule.failures[0].startswith(reason)
    assert ops(model) == before and list(model.graph.inputs) == inputs


@pytest.mark.parametrize("bad", [0, 1])
def test_one_layer_that_does_not_match_keeps_all(bad: int) -> None:
    attention = [EAGER, EAGER]
    attention[bad] = EAGER.replace("axis = -1", "axis = 2")
    model = attention_graph(Geometry(windows=(0, 0)), attention=tuple(attention))
    before = ops(model)
    rule = FuseGroupedQueryAttention()
    rule(model)
    assert rule.matches == 0 and ops(model) == before
    assert len(rule.failures) == 1 and rule.failures[0].endswith(f"(at node weights{bad})")


def test_cache_of_no_attention_keeps_all() -> None:
    attention = (EAGER, "mixed$ = Add(query$, query$)")
    model = attention_graph(Geometry(windows=(0, 0)), attention=attention, repeat=(REPEAT, ""))
    rule = FuseGroupedQueryAttention()
    rule(model)
    assert rule.matches == 0 and rule.failures == ["the graph returns a cache that no attention of it made"]


def test_attention_that_is_the_last_step_stays() -> None:
    last = JOIN.replace("joined$ = Reshape", "logits = Reshape") + "  joined$ = Identity(logits)"
    model = attention_graph(Geometry(query_heads=6), join=last, end="")
    rule = FuseGroupedQueryAttention()
    rule(model)
    assert rule.matches == 0 and len(rule.failures) == 1
    assert rule.failures[0].startswith("the joined attention output is the graph's output")
