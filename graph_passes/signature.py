"""What a language model's graph takes and gives: tokens, masks, logits and the cache of each layer.

Two forms are understood. *In place* is ours (:mod:`qwenforge.names`): caches of a fixed capacity, written at
``cache_position``. *Growing* is what exporters of others produce: the past is concatenated with the new keys and
values, or there is no past at all (a prefill graph). Names are believed where they say it all
(``past_key_values.0.key``, ``key_cache_0``, ``past_key_values.layers.0.keys`` ...); otherwise the graph's
structure tells keys from values: only keys meet the queries before the softmax.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qwenforge import names
from qwenforge.errors import GraphError

Form = Literal["growing", "in_place"]
Role = Literal["key", "value"]


@dataclass(frozen=True)
class LayerCache:
    """Names of one layer's cache tensors; the inputs are None in a prefill-only graph."""

    key_input: str | None
    value_input: str | None
    key_output: str
    value_output: str


@dataclass(frozen=True)
class Signature:
    """The role of every graph input and output, by name."""

    form: Form
    input_ids: str
    attention_mask: str | None
    position_ids: str | None
    cache_position: str | None
    logits_index: str | None
    logits: str
    layers: tuple[LayerCache, ...]

    @property
    def has_past(self) -> bool:
        """Whether the graph reads a cache (a prefill-only graph does not)."""
        return bool(self.layers) and self.layers[0].key_input is not None


def detect_signature(model: ir.Model) -> Signature:
    """Find the role of each input and output of ``model``'s graph.

    Raises:
        GraphError: an input or output has no role this project knows, or keys cannot be told from values.
    """
    tokens, caches = _split_inputs(model.graph.inputs)
    logits, presents = _split_outputs(model.graph.outputs)
    sources = [_past_of(value, caches) for value in presents]
    if caches and set(sources) != set(caches):
        lost = [value.name for value in caches if value not in sources]
        if lost:
            raise GraphError(f"cache inputs {lost} lead to no output: export the graph with its whole cache returned.")
        raise GraphError("some key/value outputs do not derive from a cache input: export prefill and decode apart.")
    keys, values = _order_by_layer(presents, sources)
    layers = tuple(
        LayerCache(_name(past_key), _name(past_value), str(key.name), str(value.name))
        for (key, past_key), (value, past_value) in zip(keys, values, strict=True)
    )
    form: Form = "in_place" if _is_in_place(keys + values) else "growing"
    cache_position = tokens.get(names.CACHE_POSITION)
    if form == "in_place" and cache_position is None:
        raise GraphError(
            f"the caches keep their size but the graph has no input '{names.CACHE_POSITION}': "
            "export it with a DynamicCache instead of a static one."
        )
    if names.INPUT_IDS not in tokens:
        raise GraphError(f"the graph has no input '{names.INPUT_IDS}': embeddings as inputs are not supported.")
    return Signature(
        form=form,
        input_ids=tokens[names.INPUT_IDS],
        attention_mask=tokens.get(_ATTENTION_MASK),
        position_ids=tokens.get(names.POSITION_IDS),
        cache_position=cache_position,
        logits_index=tokens.get(names.LOGITS_INDEX),
        logits=str(logits.name),
        layers=layers,
    )


_ATTENTION_MASK = "attention_mask"
_TOKEN_INPUTS = (names.INPUT_IDS, _ATTENTION_MASK, names.POSITION_IDS, names.CACHE_POSITION, names.LOGITS_INDEX)
_TOKEN_RANKS = dict.fromkeys(_TOKEN_INPUTS, 2) | {names.CACHE_POSITION: 1}


def _name(value: ir.Value | None) -> str | None:
    return None if value is None else str(value.name)


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else value.shape.rank()


def _split_inputs(inputs: Sequence[ir.Value]) -> tuple[dict[str, str], list[ir.Value]]:
    tokens: dict[str, str] = {}
    caches: list[ir.Value] = []
    for value in inputs:
        name = str(value.name)
        if value.const_value is not None or value.is_initializer():
            continue
        role = next((role for role in _TOKEN_INPUTS if name == role or name.endswith(("." + role, "/" + role))), None)
        if role is not None:
            if _rank(value) not in (None, _TOKEN_RANKS[role]):
                raise GraphError(
                    f"input '{name}' has {_rank(value)} dimensions where {_TOKEN_RANKS[role]} are expected: "
                    "export the graph with the plain mask and positions of its tokens."
                )
            if role in tokens:
                raise GraphError(f"inputs '{tokens[role]}' and '{name}' both look like {role}.")
            tokens[role] = name
        elif _rank(value) == 4 and value.dtype is not None and value.dtype.is_floating_point() and "mask" not in name:
            caches.append(value)
        else:
            raise GraphError(
                f"input '{name}' is neither one of {', '.join(_TOKEN_INPUTS)} nor a [B, Hk, P, D] cache: "
                "export the model with those inputs only."
            )
    return tokens, caches


def _split_outputs(outputs: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
    presents = [value for value in outputs if _rank(value) == 4]
    others = [value for value in outputs if _rank(value) != 4]
    logits = [value for value in others if value.name == names.LOGITS] or others
    if len(others) != 1:
        listed = [value.name for value in others]
        raise GraphError(f"expected the logits beside [B, Hk, P, D] caches among the outputs, found {listed}.")
    if not presents or len(presents) % 2:
        raise GraphError(
            f"expected one key and one value output a layer, found {len(presents)} outputs of 4 dimensions: "
            "export the model with use_cache=True."
        )
    return logits[0], presents


# Operators that keep cache entries as they are, so that a walk along them stays inside one cache.
_CARRIES_CACHE = frozenset(
    {"Identity", "Cast", "Concat", "Slice", "Gather", "Where", "Transpose", "Reshape"}
    | {"TensorScatter", "ScatterND", "ScatterElements"}
)
# Fused attention: for each output that is a cache, the input that is its past.
_ATTENTION_CACHES: dict[tuple[str, str], dict[int, int]] = {
    (names.DOMAIN, "GroupedQueryAttention"): {1: 3, 2: 4},
    ("com.microsoft", "GroupQueryAttention"): {1: 3, 2: 4},
    (names.DOMAIN, "QwenForgeAttention"): {1: 3, 2: 4},
    ("", "Attention"): {1: 4, 2: 5},
}


def _past_of(present: ir.Value, caches: Sequence[ir.Value]) -> ir.Value | None:
    """The cache input that ``present`` extends, or None."""
    queue: deque[ir.Value] = deque([present])
    seen: set[ir.Value] = set()
    while queue:
        value = queue.popleft()
        if value in caches:
            return value
        node = value.producer()
        if node is None or value in seen:
            continue
        seen.add(value)
        attention = _ATTENTION_CACHES.get((node.domain, node.op_type))
        candidates: list[ir.Value | None]
        if attention is not None:
            past = attention.get(value.index() or 0)
            candidates = [] if past is None or past >= len(node.inputs) else [node.inputs[past]]
        else:
            candidates = list(node.inputs) if node.op_type in _CARRIES_CACHE else []
        queue.extend(candidate for candidate in candidates if candidate is not None)
    return None


_Pair = tuple[ir.Value, ir.Value | None]


def _order_by_layer(
    presents: Sequence[ir.Value], sources: Sequence[ir.Value | None]
) -> tuple[list[_Pair], list[_Pair]]:
    """Keys and values (present, past), each in the order of the layers."""
    pairs = list(zip(presents, sources, strict=True))
    labels = [_pair_label(present, past) for present, past in pairs]
    layers = len(presents) // 2
    expected = {(role, layer) for role in ("key", "value") for layer in range(layers)}
    if set(labels) == expected:
        order = {label: pair for label, pair in zip(labels, pairs, strict=True) if label is not None}
        return [order["key", layer] for layer in range(layers)], [order["value", layer] for layer in range(layers)]
    roles = [_structural_role(present, past) for present, past in pairs]
    keys = [pair for pair, role in zip(pairs, roles, strict=True) if role == "key"]
    values = [pair for pair, role in zip(pairs, roles, strict=True) if role == "value"]
    if len(keys) != len(values):
        raise GraphError(f"found {len(keys)} key outputs and {len(values)} value outputs: there must be one a layer.")
    return keys, values


_FAMILY = re.compile(r"past_key_values?|key_values?|kv_cache")
_ROLE = re.compile(r"(?:^|[._/])(?P<role>keys?|values?|k|v)(?=$|[._/\d])")


def _label(name: str) -> tuple[Role, int] | None:
    """The (role, layer) that a name such as ``past_key_values.3.key`` or ``value_cache_3`` spells, or None."""
    rest = _FAMILY.sub("", name.lower())
    roles = {match["role"][0] for match in _ROLE.finditer(rest)}
    numbers = re.findall(r"\d+", rest)
    if len(roles) != 1 or len(numbers) != 1:
        return None
    return ("key" if roles == {"k"} else "value"), int(numbers[0])


def _pair_label(present: ir.Value, past: ir.Value | None) -> tuple[Role, int] | None:
    label, past_label = _label(str(present.name)), _label(str(past.name)) if past is not None else None
    if past is not None and label and past_label and label != past_label:
        raise GraphError(f"output '{present.name}' extends the cache '{past.name}': one of them is misnamed.")
    return label or past_label


_PRODUCTS = ("MatMul", "Einsum", "Gemm", "FusedMatMul")
# Fused attention: which input is a key or a value.
_ATTENTION_ROLES: dict[int, Role] = {1: "key", 2: "value", 3: "key", 4: "value"}
_STANDARD_ATTENTION_ROLES: dict[int, Role] = {1: "key", 2: "value", 4: "key", 5: "value"}


def _structural_role(present: ir.Value, past: ir.Value | None) -> Role:
    """Tell a key from a value by what it meets: queries (before a softmax) or attention weights (after one)."""
    found = {role for value in (present, past) if value is not None for role in _uses(value)}
    if len(found) != 1:
        problem = "both a key and a value" if found else "neither a key nor a value"
        raise GraphError(f"output '{present.name}' is used like {problem}: rename the graph's caches to tell which.")
    return found.pop()


def _uses(cache: ir.Value) -> set[Role]:
    """The roles in which ``cache`` takes part in attention, and the one in which attention produced it."""
    roles: set[Role] = set()
    producer = cache.producer()
    if producer is not None and (producer.domain, producer.op_type) in _ATTENTION_CACHES:
        return {"key" if cache.index() == 1 else "value"}
    queue, seen = deque([cache]), {cache}
    while queue:
        value = queue.popleft()
        for use in value.uses():
            node = use.node
            if (node.domain, node.op_type) in _ATTENTION_CACHES:
                table = _STANDARD_ATTENTION_ROLES if node.op_type == "Attention" else _ATTENTION_ROLES
                roles.update({table[use.idx]} if use.idx in table else ())
            elif node.op_type in _PRODUCTS:
                others = [operand for index, operand in enumerate(node.inputs) if index != use.idx]
                roles.add("value" if any(_follows_softmax(operand) for operand in others) else "key")
            elif node.op_type != "Shape":
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                queue.extend(fresh)
    return roles


def _follows_softmax(value: ir.Value | None) -> bool:
    """Whether a softmax lies behind ``value`` with no matrix product in between."""
    queue: deque[ir.Value | None] = deque([value])
    seen: set[ir.Value] = set()
    while queue:
        value = queue.popleft()
        node = None if value is None else value.producer()
        if value is None or node is None or value in seen:
            continue
        seen.add(value)
        if node.op_type == "Softmax":
            return True
        if node.op_type not in _PRODUCTS:
            queue.extend(node.inputs)
    return False


def _is_in_place(pairs: Sequence[_Pair]) -> bool:
    """Whether every cache leaves with the size it came with; False when there is no past."""
    sized = [(present.shape, past.shape) for present, past in pairs if past is not None]
    if not sized:
        return False
    same = [
        present is not None and past is not None and present[2] == past[2] and _known(past[2])
        for present, past in sized
    ]
    if any(same) and not all(same):
        raise GraphError("some caches grow and some keep their size: caches of mixed kinds are not supported.")
    return all(same)


def _known(dimension: int | ir.SymbolicDim) -> bool:
    return isinstance(dimension, int) or dimension.value is not None
