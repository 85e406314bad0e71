"""The batch size is asked of the tokens; other sizes of masks and caches stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.graph_passes.fuse.batch_size import BatchSizeFromTokens
from support.small_graphs import Array, answers, apply_rule, graph_from_text, normal, ops

ROWS, PAST, NEW, HIDDEN, VOCABULARY = 3, 4, 2, 8, 12
FIRST = "Shape<start = 0, end = 1>"
DIMENSIONS = {"input_ids": "B,S", "position_ids": "B,S", "attention_mask": "B,T", "cache": "B,2,P,4"}


def _model(size: str, **dimensions: str) -> ir.Model:
    """A model whose hidden states are expanded by the ``size`` that a node reads; it does not change them."""
    dims = DIMENSIONS | dimensions
    names = [name for name in dims if name != "cache"]
    inputs = ", ".join([f"int64[{dims[name]}] {name}" for name in names])
    inputs += f", float[{dims['cache']}] past_key_0, float[{dims['cache']}] past_value_0"
    outputs = f"float[B,S,{VOCABULARY}] logits, float[B,2,T,4] present_key_0, float[B,2,T,4] present_value_0"
    nodes = f"""heads = Constant<value_ints = [0, 0, 2, 4]>()  ones = Constant<value_ints = [1, 1]>()
      x = Gather(embedding, input_ids)  flat = Reshape(x, heads)  k = Transpose<perm = [0, 2, 1, 3]>(flat)
      present_key_0 = Concat<axis = 2>(past_key_0, k)  present_value_0 = Concat<axis = 2>(past_value_0, k)
      {size}  sizes = Concat<axis = 0>(size, ones)  same = Expand(x, sizes)  logits = MatMul(same, head)"""
    weights = {"embedding": normal(16, HIDDEN), "head": normal(HIDDEN, VOCABULARY)}
    return graph_from_text(f"({inputs}) => ({outputs}) {{ {nodes} }}", **weights)


def _feeds(rows: int = ROWS) -> dict[str, Array]:
    cache = normal(rows, 2, PAST, 4)
    return {
        "input_ids": np.arange(rows * NEW).reshape(rows, NEW),
        "position_ids": np.tile(PAST + np.arange(NEW), (rows, 1)),
        "attention_mask": np.ones((rows, PAST + NEW), np.int64),
        "past_key_0": cache,
        "past_value_0": cache,
    }


def _asked(model: ir.Model) -> list[str | None]:
    return [value.name for node in model.graph if node.op_type == "Shape" for value in node.inputs if value is not None]


@pytest.mark.parametrize("source", ["past_key_0", "past_value_0", "attention_mask", "position_ids"])
def test_batch_size_is_read_off_the_tokens(source: str) -> None:
    model = _model(f"size = {FIRST}({source})")
    expected = answers(model, **_feeds())
    before = ops(model)
    rule = apply_rule(BatchSizeFromTokens(), model)
    assert rule.matches == 1 and rule.failures == []
    assert ops(model) == before and _asked(model) == ["input_ids"]
    node = next(node for node in model.graph if node.op_type == "Shape")
    assert [node.attributes[name].as_int() for name in ("start", "end")] == [0, 1]
    found = answers(model, **_feeds())
    assert all(np.array_equal(new, old) for new, old in zip(found, expected, strict=True))


def test_every_reader_is_rewritten_once() -> None:
    model = _model(f"a = {FIRST}(past_key_0)  b = {FIRST}(attention_mask)  c = Max(a, b)  size = Max(c, a)")
    rule = apply_rule(BatchSizeFromTokens(), model)
    assert rule.matches == 2 and _asked(model) == ["input_ids", "input_ids"]
    again = apply_rule(BatchSizeFromTokens(), model)
    assert again.matches == 0 and again.failures == []


def test_start_that_is_not_written_is_the_first_dimension() -> None:
    model = _model("size = Shape<end = 1>(past_key_0)")
    assert apply_rule(BatchSizeFromTokens(), model).matches == 1 and _asked(model) == ["input_ids"]


OTHERS = {
    "the length of the past": "other = Shape<start = 2, end = 3>(past_key_0)",
    "the length of the mask": "other = Shape<start = 1, end = 2>(attention_mask)",
    "the whole shape": "other = Shape(past_key_0)",
    "two dimensions": "other = Shape<start = 0, end = 2>(past_key_0)",
    "no dimension": "other = Shape<start = 1, end = 1>(past_key_0)",
    "up to the last": "other = Shape<start = 0, end = -1>(attention_mask)",
    "an inner value": f"other = {FIRST}(k)",
    "a weight": f"other = {FIRST}(embedding)",
    "the tokens already": f"other = {FIRST}(input_ids)",
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_sizes_stay(case: str) -> None:
    last = "total = ReduceSum(other)  one = Constant<value_ints = [1]>()  size = Min(total, one)"
    model = _model(f"{OTHERS[case]}  {last}")
    before = _asked(model)
    rule = apply_rule(BatchSizeFromTokens(), model)
    assert rule.matches == 0 and rule.failures == [] and _asked(model) == before


@pytest.mark.parametrize("source", ["position_ids", "attention_mask", "past_key_0"])
def test_one_row_for_all_stays_and_is_told(source: str) -> None:
    """Positions, a mask or a past of one row, spread over the rows of the tokens: the sizes differ."""
    name = "cache" if source == "past_key_0" else source
    model = _model(f"size = {FIRST}({source})", **{name: DIMENSIONS[name].replace("B", "1")})
    rule = BatchSizeFromTokens()
    rule(model)
    assert rule.matches == 0 and _asked(model) == [source]
    assert rule.failures == [f"{source} does not have the batch size of input_ids (at node size)"]


def test_fixed_batch_sizes_that_agree_are_one() -> None:
    fixed = {name: dims.replace("B", str(ROWS)) for name, dims in DIMENSIONS.items()}
    model = _model(f"size = {FIRST}(past_key_0)", **fixed)
    rule = apply_rule(BatchSizeFromTokens(), model)
    assert rule.matches == 1 and rule.failures == [] and _asked(model) == ["input_ids"]
