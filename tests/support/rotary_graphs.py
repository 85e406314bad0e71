"""A one-layer graph whose keys are rotated, with every part of the rotation replaceable, and what it should answer."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from support.small_graphs import Array, graph_from_text, normal

HEADS, SIZE, HALF, VOCABULARY, POSITIONS = 2, 8, 4, 16, 64
THETA = 1e4
# Nodes, not initializers: shapes are inferred from them.
INTEGERS = "  ".join(f"n{number} = Constant<value_ints = [{number}]>()" for number in (0, 1, 2, 3, 4, 8, 2**63 - 1))
INTEGERS = f"""{INTEGERS.replace(f"n{2**63 - 1}", "far")}  one = Constant<value_int = 1>()
  heads = Constant<value_ints = [0, 0, {HEADS}, {SIZE}]>()  sizes = Constant<value_ints = [{HALF}, {HALF}]>()"""
SPLIT = "low = Slice(k, n0, n4, n3, n1)  up = Slice(k, n4, far, n3, n1)"
ROTATE = "neg = Neg(up)  half = Concat<axis = -1>(neg, low)"
SUM = "a = Mul(k, cos)  b = Mul(half, sin)  present_key_0 = Add(a, b)"
ROTATION = f"{SPLIT}  {ROTATE}  {SUM}"
ANGLES = "p = Unsqueeze(position_ids, n1)  f = Cast<to = 1>(p)  m = MatMul(inv_freq, f)"
ANGLES += "  angle = Transpose<perm = [0, 2, 1]>(m)"
TABLES = "e = Concat<axis = -1>(angle, angle)  c = Cos(e)  s = Sin(e)"
LIFT = "cos = Unsqueeze(c, n1)  sin = Unsqueeze(s, n1)"
COMPUTED = f"{ANGLES}  {TABLES}  {LIFT}"
COUNTED = """new = Shape<start = 1, end = 2>(input_ids)  old = Shape<start = 2, end = 3>(past_key_0)
  total = Add(old, new)  from = Squeeze(old)  to = Squeeze(total)  counted = Range(from, to, one)
  row = Unsqueeze(counted, n0)"""


def renamed(nodes: str, **names: str) -> str:
    """``nodes`` with values called otherwise."""
    for old, new in names.items():
        nodes = re.sub(rf"\b{old}\b", new, nodes)
    return nodes


def plain_frequencies() -> Array:
    return 1 / THETA ** (np.arange(HALF) / HALF)


def yarn_frequencies(factor: float = 4.0, original: int = 16) -> Array:
    """YaRN (arXiv 2309.00071, 3.2) with alpha 1 and beta 32: low frequencies are interpolated, high ones are not."""
    plain = plain_frequencies()
    ramp = np.clip((original * plain / (2 * np.pi) - 1) / (32 - 1), 0, 1)
    return (1 - ramp) * plain / factor + ramp * plain


def rotary_model(
    rotation: str = ROTATION,
    tables: str = COMPUTED,
    kind: str = "float",
    inputs: str = "",
    past: bool = False,
    **given: Array,
) -> ir.Model:
    """Keys of one layer from embedded tokens; the rotated ones leave as the layer's cache, and ``past`` joins them."""
    dtype = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[kind]
    cache = f"{kind}[B,{HEADS},%s,{SIZE}]"
    # Keys alone have a past to count from: what is asked of the rule is the rotation.
    taken = f", {cache % 'P'} past_key_0, {cache % 'P'} past_value_0" if past else ""
    start = f"(int64[B,S] input_ids{', int64[B,S] position_ids' if not past else ''}{taken}{inputs})"
    start += f" => ({kind}[B,S,{VOCABULARY}] logits, {cache % 'T'} present_key_0, {cache % 'T'} present_value_0)"
    body = (
        f"x = Gather(embedding, input_ids)  flat = Reshape(x, heads)  k = Transpose<perm = [0, 2, 1, 3]>(flat) {tables}"
    )
    ending = "present_value_0 = Identity(k)"
    if past:
        rotation = rotation.replace("present_key_0", "turned")
        ending = (
            "present_key_0 = Concat<axis = 2>(past_key_0, turned)  present_value_0 = Concat<axis = 2>(past_value_0, k)"
        )
    weights: dict[str, Array] = {
        "embedding": normal(VOCABULARY, HEADS * SIZE, dtype=dtype),
        "head": normal(HEADS * SIZE, VOCABULARY, dtype=dtype),
        "inv_freq": plain_frequencies().astype(np.float32)[None, :, None],
        **given,
    }
    nodes = f"{INTEGERS}  {body}  {rotation}  {ending}  logits = MatMul(x, head)"
    used = {name: array for name, array in weights.items() if f", {name}" in nodes or f"({name}" in nodes}
    return graph_from_text(f"{start} {{ {nodes} }}", **used)


def rotary_feeds(rows: int = 2, new: int = 5) -> dict[str, Array]:
    """Rows that stand at different positions, in no order."""
    random = np.random.default_rng(3)
    positions = random.permutation(POSITIONS)[: rows * new].reshape(rows, new)
    return {"input_ids": random.integers(0, VOCABULARY, (rows, new)), "position_ids": positions}


def rotated_keys(
    feeds: dict[str, Array], dtype: Any = np.float32, frequencies: Array | None = None, factor: float = 1
) -> Array:
    embedding = normal(VOCABULARY, HEADS * SIZE, dtype=dtype).astype(np.float64)
    rows, new = feeds["input_ids"].shape
    keys = embedding[feeds["input_ids"]].reshape(rows, new, HEADS, SIZE).transpose(0, 2, 1, 3)
    frequencies = plain_frequencies() if frequencies is None else frequencies
    angles = feeds["position_ids"][:, None, :, None] * frequencies
    first, second = keys[..., :HALF], keys[..., HALF:]
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    result: Array = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return result
