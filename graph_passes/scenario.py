"""Seeded test cases for a language model's graph, and how to put them to a graph of either form.

A :class:`Scenario` says what happens (how many tokens each row already has in its cache, how many come now) with no
regard to a graph's form; :class:`CaseData` draws the numbers; :func:`feeds` lays them out for a signature and
:func:`readings` takes the comparable part out of what comes back: the logits of real tokens, and each layer's cache as
far as it is valid. Places that no valid token may look at hold large random numbers, so that a leak shows.

Layout in a growing graph: a row's past ends where the new tokens begin (padded on the left, hidden by the mask), its
new tokens are padded on the right. In place: as :mod:`qwenforge.names` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.graph_passes.execution import Array
from qwenforge.graph_passes.signature import Signature

_JUNK = 8.0
"""Standard deviation of what lies where nothing valid may look, against 1 for valid cache entries."""
_SPARE = 3
"""Unused places behind the last token of an in-place cache whose capacity is free."""


@dataclass(frozen=True)
class Scenario:
    """Rows of ``past`` cached tokens and ``new`` tokens each, in tensors for ``padded_past`` and ``padded_new``."""

    name: str
    past: tuple[int, ...]
    new: tuple[int, ...]
    padded_past: int
    padded_new: int


@dataclass(frozen=True)
class Skipped:
    """A scenario that a graph cannot express or run, and why."""

    scenario: str
    reason: str


@dataclass(frozen=True)
class Geometry:
    """Sizes that a graph fixes; None where any size goes."""

    batch: int | None
    new: int | None
    past: int | None
    capacity: int | None
    vocabulary: int
    caches: tuple[tuple[int, int], ...]
    """(heads, head size) of each layer."""
    positions_from_mask: bool
    """Whether a graph without position_ids counts the mask (otherwise positions are places in the tensors)."""


_PLANS = (
    ("prefill", (0,), (7,)),
    ("prefill of unequal rows", (0, 0, 0), (5, 7, 2)),
    ("decode against a part-filled cache", (6, 3), (1, 1)),
    ("several tokens against a part-filled cache", (4, 7), (3, 2)),
)


def geometry(model: ir.Model, signature: Signature) -> Geometry:
    """The sizes that ``model`` fixes.

    Raises:
        GraphError: the vocabulary or a cache's heads are of unknown size.
    """
    values = {str(value.name): value for value in (*model.graph.inputs, *model.graph.outputs)}

    def size(name: str | None, axis: int) -> int | None:
        shape = values[name].shape if name is not None else None
        dimension = None if shape is None else shape[axis]
        return dimension if isinstance(dimension, int) else None

    caches = []
    for layer in signature.layers:
        names = [name for name in (layer.key_output, layer.key_input) if name is not None]
        heads, width = (next((s for name in names if (s := size(name, axis))), None) for axis in (1, 3))
        if heads is None or width is None:
            raise GraphError(f"the heads of cache '{layer.key_output}' have no fixed size in the graph.")
        caches.append((heads, width))
    vocabulary = size(signature.logits, -1) or _embedding_rows(model, signature)
    past = size(signature.layers[0].key_input, 2)
    new = size(signature.input_ids, 1)
    mask = size(signature.attention_mask, 1) if signature.form == "growing" else None
    if past is None and mask is not None and new is not None:
        past = mask - new
    return Geometry(
        batch=size(signature.input_ids, 0),
        new=new if new is not None or mask is None or past is None else mask - past,
        past=past if signature.form == "growing" else None,
        capacity=past if signature.form == "in_place" else None,
        vocabulary=vocabulary,
        caches=tuple(caches),
        positions_from_mask=signature.position_ids is None and _counts_mask(model, signature),
    )


def _embedding_rows(model: ir.Model, signature: Signature) -> int:
    for value in model.graph.inputs:
        if value.name == signature.input_ids:
            for node, index in value.uses():
                table = node.inputs[0]
                if node.op_type == "Gather" and index == 1 and table is not None and table.shape is not None:
                    rows = table.shape[0]
                    if isinstance(rows, int):
                        return rows
    raise GraphError("the vocabulary has no fixed size: neither the logits nor the embedding table tell it.")


def _counts_mask(model: ir.Model, signature: Signature) -> bool:
    """Whether a cumulative sum over the attention mask is among the nodes."""
    mask = next((value for value in model.graph.inputs if value.name == signature.attention_mask), None)
    queue, seen = [] if mask is None else [mask], set[ir.Value]()
    while queue:
        for node, _ in queue.pop().uses():
            if node.op_type == "CumSum":
                return True
            if node.op_type in ("Cast", "Identity", "Slice", "Sub"):
                queue += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
    return False


def scenarios_for(signature: Signature, sizes: Geometry) -> tuple[list[Scenario], list[Skipped]]:
    """The scenarios that a graph can express, and those that it cannot with the reason."""
    accepted: list[Scenario] = []
    skipped: list[Skipped] = []
    for name, past, new in _PLANS:
        outcome = _fit(name, past, new, signature, sizes)
        if isinstance(outcome, Scenario):
            accepted.append(outcome)
            if len(set(past)) > 1 and len(set(outcome.past)) == 1:
                skipped.append(Skipped(f"{name}, caches filled unequally", _why_equal(signature, sizes)))
        else:
            skipped.append(Skipped(name, outcome))
    return accepted, skipped


def _why_equal(signature: Signature, sizes: Geometry) -> str:
    return "the graph has no attention mask to hide padding" if sizes.batch != 1 else "the graph takes one row only"


def _fit(
    name: str, past: tuple[int, ...], new: tuple[int, ...], signature: Signature, sizes: Geometry
) -> Scenario | str:
    """The scenario with the graph's fixed sizes, or why there is none."""
    rows = sizes.batch or len(past)
    past = tuple(past[row % len(past)] for row in range(rows))
    new = tuple(new[row % len(new)] for row in range(rows))
    growing = signature.form == "growing"
    if max(past) and not signature.has_past:
        return "the graph takes no cache"
    limit = sizes.new or max(new)
    if sizes.new == 1 and max(new) > 1:
        return "the graph takes one token at a time"
    if sizes.new is not None and sizes.new > 1 and max(new) == 1:
        return f"the graph takes {sizes.new} tokens at a time"
    new = tuple(limit if count == max(new) else min(count, limit) for count in new)
    if growing and signature.has_past and sizes.past is not None:
        if max(past) == 0:
            return f"the graph takes a cache of {sizes.past} tokens, never an empty one"
        past = tuple(sizes.past if count == max(past) else min(count, sizes.past) for count in past)
    if growing and signature.attention_mask is None and len(set(past)) > 1:
        past = (max(past),) * rows
    if sizes.capacity is not None:
        room = sizes.capacity - limit
        if room < 0:
            return f"the cache holds {sizes.capacity} tokens, fewer than {limit} new ones"
        past = tuple(min(count, room) for count in past)
    return Scenario(name, past, new, sizes.past if growing and sizes.past is not None else max(past), limit)


@dataclass(frozen=True)
class CaseData:
    """The numbers of a scenario: tokens [B, padded_new], positions [B, padded_new] and, for each layer and row, the
    valid cache entries [2 (key, value), past, heads, head size]."""

    scenario: Scenario
    tokens: Array
    positions: Array
    caches: tuple[tuple[Array, ...], ...]
    seed: int


def draw(scenario: Scenario, signature: Signature, sizes: Geometry, seed: int) -> CaseData:
    """Seeded numbers for ``scenario``; positions as the graph of ``signature`` counts them."""
    random = np.random.default_rng([seed, *scenario.past, *scenario.new])
    rows = len(scenario.past)
    tokens = random.integers(0, sizes.vocabulary, (rows, scenario.padded_new))
    caches = tuple(
        tuple(random.standard_normal((2, past, heads, width)) for past in scenario.past)
        for heads, width in sizes.caches
    )
    counted = signature.form == "in_place" or signature.position_ids is not None or sizes.positions_from_mask
    first = np.asarray(scenario.past if counted else (scenario.padded_past,) * rows)
    return CaseData(scenario, tokens, first[:, None] + np.arange(scenario.padded_new), caches, seed)


def feeds(data: CaseData, signature: Signature, sizes: Geometry) -> dict[str, Array]:
    """The inputs of a graph of ``signature`` for ``data``; floating ones in float64, to be cast by the caller.

    Raises:
        GraphError: the graph's fixed sizes have no room for the scenario.
    """
    scenario = data.scenario
    fed: dict[str, Array] = {signature.input_ids: data.tokens}
    if signature.position_ids is not None:
        fed[signature.position_ids] = data.positions
    in_place = signature.form == "in_place"
    length = scenario.padded_past
    if in_place:
        length = sizes.capacity or max(scenario.past) + scenario.padded_new + _SPARE
        if max(scenario.past) + scenario.padded_new > length:
            raise GraphError(f"a cache of capacity {length} has no room for scenario '{scenario.name}'.")
    if signature.attention_mask is not None:
        fed[signature.attention_mask] = _mask(scenario, length if in_place else None)
    if signature.cache_position is not None:
        growing = np.arange(length, length + scenario.padded_new)
        fed[signature.cache_position] = np.asarray(scenario.past) if in_place else growing
    if signature.logits_index is not None:
        rows = len(scenario.past)
        fed[signature.logits_index] = np.tile(np.arange(scenario.padded_new), (rows, 1))
    junk = np.random.default_rng([data.seed, 1])
    for layer, caches in zip(signature.layers, data.caches, strict=True):
        for role, name in enumerate((layer.key_input, layer.value_input)):
            if name is None:
                continue
            heads, width = caches[0].shape[2:]
            cache = _JUNK * junk.standard_normal((len(caches), heads, length, width))
            for row, entries in enumerate(caches):
                start = 0 if in_place else length - entries.shape[1]
                cache[row, :, start : start + entries.shape[1]] = entries[role].swapaxes(0, 1)
            fed[name] = cache
    return fed


def _mask(scenario: Scenario, capacity: int | None) -> Array:
    """[B, padded_past + padded_new] in a growing graph, [B, capacity] in place: 1 where a valid token lies."""
    mask = np.zeros((len(scenario.past), capacity or scenario.padded_past + scenario.padded_new), np.int64)
    for row, (past, new) in enumerate(zip(scenario.past, scenario.new, strict=True)):
        start = 0 if capacity else scenario.padded_past - past
        mask[row, start : start + past + new] = 1
    return mask


def output_names(signature: Signature) -> list[str]:
    """The outputs that :func:`readings` expects, in its order."""
    caches = [name for layer in signature.layers for name in (layer.key_output, layer.value_output)]
    return [signature.logits, *caches]


def readings(data: CaseData, signature: Signature, outputs: list[Array]) -> Mapping[str, Array]:
    """What a graph's outputs say about valid tokens, comparable between forms, in fp32.

    Returns:
        ``logits`` [valid new tokens (of all rows, concatenated), V], and ``key i`` and ``value i``
        [valid tokens of all rows, Hk, D]: the whole valid cache, so that a damaged past shows too.

    Raises:
        GraphError: an output has not the expected number of rows or tokens.
    """
    scenario = data.scenario
    logits, *caches = (np.asarray(output, dtype=np.float32) for output in outputs)
    rows = len(scenario.past)
    if logits.shape[:-1] != (rows, scenario.padded_new):
        raise GraphError(
            f"the logits have shape {list(logits.shape)} where [{rows}, {scenario.padded_new}, V] is expected: "
            "export the graph with the logits of every token."
        )
    read = {"logits": np.concatenate([logits[row, : scenario.new[row]] for row in range(rows)])}
    for index, cache in enumerate(caches):
        name = f"{('key', 'value')[index % 2]} {index // 2}"
        read[name] = _valid_entries(cache, data, signature, name)
    return read


def _valid_entries(cache: Array, data: CaseData, signature: Signature, name: str) -> Array:
    scenario = data.scenario
    length = cache.shape[2]
    if signature.form == "growing" and length != scenario.padded_past + scenario.padded_new:
        raise GraphError(
            f"the cache '{name}' leaves with {length} tokens instead of the "
            f"{scenario.padded_past} cached and {scenario.padded_new} new ones."
        )
    parts = []
    for row, (past, new) in enumerate(zip(scenario.past, scenario.new, strict=True)):
        start = 0 if signature.form == "in_place" else scenario.padded_past - past
        parts.append(cache[row, :, start : start + past + new].swapaxes(0, 1))
    return np.concatenate(parts)
