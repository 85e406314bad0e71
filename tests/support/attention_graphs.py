"""Small attention models over a growing cache, written node by node, and what they should answer.

A model is tokens -> embedding -> layers of attention with a residual -> logits, in ONNX's text form. Each part of it
is a fragment that a test may replace; ``$`` in a fragment stands for the layer's number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qwenforge import names
from support.small_graphs import Array, graph_from_text, normal

VOCABULARY, HIDDEN, POSITIONS, EPSILON = 24, 12, 64, 1e-6
TYPES: dict[str, Any] = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Geometry:
    """Sizes and switches of a model.

    Attributes:
        past: whether there are cache inputs; a prefill graph has none.
        padded: whether there is an ``attention_mask``.
        normed: whether each query and key head is normalized, as in Qwen3.
        windows: tokens that a query of each layer sees, 0 for all; one number a layer.
    """

    query_heads: int = 4
    kv_heads: int = 2
    size: int = 4
    windows: tuple[int, ...] = (0,)
    past: bool = True
    padded: bool = True
    normed: bool = False
    kind: str = "float"

    @property
    def scale(self) -> float:
        """What the scores are multiplied by: not the head size's root, which is a default of the Attention op."""
        return 0.4


CAUSAL = "causal = LessOrEqual(keys, queries)"
WINDOW = "oldest$ = Sub(queries, window$)  near$ = Greater(keys, oldest$)  causal$ = And(causal, near$)"
PADDING = "told = Cast<to = 9>(attention_mask)  padding = Unsqueeze(told, n1n2)"
MASK = "mask$ = Where(seen$, zero, lowest)"
QUERY = "query$ = RotaryEmbedding(q_heads$, cos, sin, position_ids)"
KEY = "key$ = RotaryEmbedding(k_heads$, cos, sin, position_ids)"
CACHE = (
    "present_key_$ = Concat<axis = 2>(past_key_$, key$)  present_value_$ = Concat<axis = -2>(past_value_$, v_heads$)"
)
REPEAT = """lifted_k$ = Unsqueeze(present_key_$, n2)  spread_k$ = Expand(lifted_k$, groups)
  keys$ = Reshape(spread_k$, all_heads)
  lifted_v$ = Unsqueeze(present_value_$, n2)  spread_v$ = Expand(lifted_v$, groups)
  values$ = Reshape(spread_v$, all_heads)"""
NO_REPEAT = "keys$ = Identity(present_key_$)  values$ = Identity(present_value_$)"
TURNED = "turned$ = Transpose<perm = [0, 1, 3, 2]>(keys$)"
SCORES = "products$ = MatMul(query$, turned$)  scaled$ = Mul(products$, scale)  scores$ = Add(scaled$, mask$)"
SOFTMAX = "weights$ = Softmax<axis = -1>(scores$)"
MIXED = "mixed$ = MatMul(weights$, values$)"
EAGER = f"{TURNED}  {SCORES}  {SOFTMAX}  {MIXED}"
OP = "mixed$ = Attention<scale = 0.4>(query$, keys$, values$, mask$)"
JOIN = "apart$ = Transpose<perm = [0, 2, 1, 3]>(mixed$)  joined$ = Reshape(apart$, width)"
PARTS = {
    "lengths": "old = Shape<start = 2, end = 3>(past_key_0)",
    "places": """new = Shape<start = 1, end = 2>(input_ids)  total = Add(old, new)
  first = Squeeze(old)  last = Squeeze(total)  keys = Range(nought, last, one)
  rows = Range(first, last, one)  queries = Unsqueeze(rows, n1)""",
    "causal": CAUSAL,
    "padding": PADDING,
    "seen": "seen$ = And(causal, padding)",
    "mask": MASK,
    "query": QUERY,
    "key": KEY,
    "cache": CACHE,
    "repeat": REPEAT,
    "attention": EAGER,
    "join": JOIN,
    "end": "logits = MatMul(x_last, head)",
}
_SPLIT = "{role}_flat$ = MatMul(x$, w{role}$)  {role}_split$ = Reshape({role}_flat$, {role}_shape)"
_TURN = "{role}_heads$ = Transpose<perm = [0, 2, 1, 3]>({role}_%s$)"
_NORM = "{role}_normed$ = RMSNormalization<axis = -1, epsilon = 1e-6>({role}_split$, {role}_norm$)"
_GLOBAL = ("lengths", "places", "causal", "padding")
_LAYER = ("seen", "mask", "query", "key", "cache", "repeat", "attention", "join")


def attention_graph(
    geometry: Geometry | None = None, /, given: dict[str, Array] | None = None, **parts: Any
) -> ir.Model:
    """The model of ``geometry``, some of its :data:`PARTS` replaced.

    Args:
        geometry: sizes and switches.
        given: further initializers, or others of the same names.
        parts: fragments by name; a tuple of texts has one for each layer. ``inputs`` adds to the signature,
            ``value_cache`` is another type of the value caches; a list replaces the constant of that name.
    """
    geometry = geometry or Geometry()
    chosen: dict[str, Any] = PARTS | _defaults(geometry) | parts
    nodes = ["x0 = Gather(embedding, input_ids)", *(chosen[name] for name in _GLOBAL)]
    layers = len(geometry.windows)
    for layer in range(layers):
        texts = [chosen[name] if isinstance(chosen[name], str) else chosen[name][layer] for name in _LAYER]
        texts[2:2] = [_projection(role, geometry) for role in "qkv"]
        following = f"x{layer + 1}" if layer + 1 < layers else "x_last"
        texts.append(f"out$ = MatMul(joined$, wo$)  {following} = Add(x$, out$)")
        nodes += [_named(text, geometry).replace("$", str(layer)) for text in texts]
    body = "  ".join([*nodes, chosen["end"]])
    used = set(re.findall(r"\w+", body))
    lists = {name: part for name, part in parts.items() if isinstance(part, list)}
    constants = _constants(geometry, lists)
    body = "  ".join([text for name, text in constants.items() if name in used] + [body])
    weights = {name: array for name, array in (_weights(geometry) | (given or {})).items() if name in used}
    cache = f"{geometry.kind}[B,{geometry.kv_heads},%s,{geometry.size}]"
    caches = {"key": cache, "value": chosen.get("value_cache", cache)}
    signature = _signature(geometry, caches, chosen.get("inputs", ""), body)
    return graph_from_text(f"{signature} {{ {body} }}", **weights)


def _named(text: str, geometry: Geometry) -> str:
    """Without a past, the new keys and values are what the graph returns."""
    if geometry.past:
        return text
    return re.sub(r"\bkey\$", "present_key_$", re.sub(r"\bv_heads\$", "present_value_$", text))


def _defaults(geometry: Geometry) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    causal = "causal"
    if any(geometry.windows):
        causal = "causal$"
        changed["seen"] = tuple(WINDOW if window else "causal$ = Identity(causal)" for window in geometry.windows)
    else:
        changed["seen"] = ("",) * len(geometry.windows)
    ending = f"seen$ = And({causal}, padding)" if geometry.padded else f"seen$ = Unsqueeze({causal}, n0n1)"
    changed["seen"] = tuple(f"{text}  {ending}" for text in changed["seen"])
    if not geometry.padded:
        changed["padding"] = ""
    if not geometry.past:
        changed["lengths"] = "old = Sub(n1, n1)"
        changed["cache"] = ""
    if geometry.query_heads == geometry.kv_heads:
        changed["repeat"] = ""
        changed["attention"] = _unrepeated(EAGER)
    return changed


def _unrepeated(attention: str) -> str:
    """``attention`` reading the cache itself, without repeated heads between."""
    return re.sub(r"\bkeys\$", "present_key_$", re.sub(r"\bvalues\$", "present_value_$", attention))


def unrepeated(attention: str) -> dict[str, str]:
    """The parts of a model whose ``attention`` reads the cache itself."""
    return {"repeat": "", "attention": _unrepeated(attention)}


def _projection(role: str, geometry: Geometry) -> str:
    normed = geometry.normed and role != "v"
    steps = [_SPLIT, _NORM, _TURN % "normed"] if normed else [_SPLIT, _TURN % "split"]
    return "  ".join(steps).format(role=role)


def _signature(geometry: Geometry, caches: dict[str, str], inputs: str, body: str) -> str:
    taken = ["int64[B,S] input_ids", *(["int64[B,T] attention_mask"] if geometry.padded else [])]
    taken += ["int64[B,S] position_ids"] if re.search(r"\bposition_ids\b", body) else []
    given = [f"{geometry.kind}[B,S,{VOCABULARY}] logits"]
    for layer in range(len(geometry.windows)):
        for role, cache in caches.items():
            taken += [f"{cache % 'P'} past_{role}_{layer}"] if geometry.past else []
            given += [f"{cache % 'T'} present_{role}_{layer}"]
    taken += [inputs] if inputs else []
    return f"({', '.join(taken)}) => ({', '.join(given)})"


def _constants(geometry: Geometry, given: dict[str, list[int]]) -> dict[str, str]:
    """As nodes, not initializers: shapes are inferred from them."""
    heads, shared, size = geometry.query_heads, geometry.kv_heads, geometry.size
    lists: dict[str, Sequence[int]] = {f"n{number}": (number,) for number in range(5)}
    lists |= {"minus_one": (-1,), "n0n1": (0, 1), "n1n2": (1, 2), "n1n3": (1, 3), "all_heads": (0, heads, -1, size)}
    lists |= {"groups": (1, 1, heads // shared, 1, 1), "width": (0, 0, heads * size)}
    lists |= {"q_shape": (0, 0, heads, size), "k_shape": (0, 0, shared, size), "v_shape": (0, 0, shared, size)}
    lists |= given
    texts = {name: f"{name} = Constant<value_ints = {list(numbers)}>()" for name, numbers in lists.items()}
    texts |= {name: f"{name} = Constant<value_int = {number}>()" for name, number in {"nought": 0, "one": 1}.items()}
    return texts


def _angles(geometry: Geometry) -> Array:
    return np.arange(POSITIONS)[:, None] * 100.0 ** -(np.arange(geometry.size // 2) / (geometry.size // 2))


def _weights(geometry: Geometry) -> dict[str, Array]:
    dtype = TYPES[geometry.kind]
    q_width, kv_width = geometry.query_heads * geometry.size, geometry.kv_heads * geometry.size
    weights: dict[str, Array] = {"embedding": normal(VOCABULARY, HIDDEN), "head": normal(HIDDEN, VOCABULARY, scale=0.3)}
    for layer, window in enumerate(geometry.windows):
        weights |= {f"wq{layer}": normal(HIDDEN, q_width, seed=4 * layer, scale=0.5)}
        weights |= {f"wk{layer}": normal(HIDDEN, kv_width, seed=4 * layer + 1, scale=0.5)}
        weights |= {f"wv{layer}": normal(HIDDEN, kv_width, seed=4 * layer + 2, scale=0.5)}
        weights |= {f"wo{layer}": normal(q_width, HIDDEN, seed=4 * layer + 3, scale=0.5)}
        weights |= {f"{role}_norm{layer}": 1 + normal(geometry.size, seed=5 + layer) / 4 for role in "qk"}
        weights |= {f"window{layer}": np.array(window)}
    angles = _angles(geometry)
    weights |= {"cos": np.cos(angles), "sin": np.sin(angles), "zero": np.array(0.0), "scale": np.array(geometry.scale)}
    weights |= {"divisor": np.array(1 / geometry.scale), "root": np.array(geometry.scale**0.5)}
    lowest = np.array(-65504 if geometry.kind == "float16" else np.finfo(np.float32).min)
    floating = {name: array.astype(dtype) for name, array in weights.items() if array.dtype.kind == "f"}
    return weights | floating | {"lowest": lowest.astype(dtype)}


def expected_logits(geometry: Geometry, tokens: Sequence[int]) -> Array:
    """The logits [tokens, V] of one row, in float64, from the definition of attention: query by query."""
    weights = {name: array.astype(np.float64) for name, array in _weights(geometry).items()}
    x = weights["embedding"][list(tokens)]
    groups = geometry.query_heads // geometry.kv_heads
    for layer, window in enumerate(geometry.windows):
        heads: dict[str, Array] = {}
        for role in "qkv":
            split = (x @ weights[f"w{role}{layer}"]).reshape(len(tokens), -1, geometry.size)
            if role != "v":
                if geometry.normed:
                    root = np.sqrt((split**2).mean(-1, keepdims=True) + EPSILON)
                    split = split / root * weights[f"{role}_norm{layer}"]
                split = _rotated(split, _angles(geometry)[: len(tokens), None])
            heads[role] = split
        mixed = np.zeros_like(heads["q"])
        for query in range(len(tokens)):
            start = max(0, query + 1 - window) if window else 0
            for head in range(geometry.query_heads):
                keys = heads["k"][start : query + 1, head // groups]
                scores = geometry.scale * keys @ heads["q"][query, head]
                shares = np.exp(scores - scores.max())
                mixed[query, head] = shares / shares.sum() @ heads["v"][start : query + 1, head // groups]
        x = x + mixed.reshape(len(tokens), -1) @ weights[f"wo{layer}"]
    logits: Array = x @ weights["head"]
    return logits


def _rotated(heads: Array, angles: Array) -> Array:
    first, second = np.split(heads, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def fused_logits(model: ir.Model, steps: Sequence[Sequence[Sequence[int]]], *, capacity: int = 24) -> list[Array]:
    """Each row's logits [tokens, V] from a fused ``model`` fed in ``steps``, its caches first filled with garbage.

    Args:
        model: a model with fixed-capacity caches and ``cache_position``, without ``logits_index``.
        steps: for each call, the new tokens of each row; rows may differ in length.
        capacity: tokens in the cache.
    """
    from support.cached_decoder import load_session

    session = load_session(model, optimize=False)
    rows = len(steps[0])
    lengths = np.zeros(rows, np.int64)
    answers: list[list[Array]] = [[] for _ in range(rows)]
    outputs = [value.name for value in session.get_outputs()]
    caches: dict[str, Array] = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            caches[value.name] = normal(rows, value.shape[1], capacity, value.shape[3], scale=8, dtype=dtype)
    for step in steps:
        longest = max(map(len, step))
        tokens = np.array([[*row, *[0] * (longest - len(row))] for row in step])
        feeds = {names.INPUT_IDS: tokens, names.CACHE_POSITION: lengths, **caches}
        feeds[names.POSITION_IDS] = lengths[:, None] + np.arange(longest)
        results = dict(zip(outputs, session.run(None, feeds), strict=True))
        caches = {name: results[name.replace("past_key_values.", "present.")] for name in caches}
        for row, new in enumerate(step):
            answers[row].append(results[names.LOGITS][row, : len(new)])
        lengths = lengths + [len(row) for row in step]
    return [np.concatenate(parts) for parts in answers]
