"""Rotary position embedding: ``x * cos + rotate_half(x) * sin`` -> ``RotaryEmbedding`` with shared tables.

A ``RotaryEmbedding`` that an exporter emitted itself, over cos and sin computed at run time, is given the tables too.

The tables are read off the graph: the nodes between the integer positions and cos/sin are run once for every
position, so default, linear and YaRN scaling (whose attention factor multiplies cos and sin) need no code of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy before a bf16 table is compared)
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge import names
from qwenforge.errors import GraphError
from qwenforge.graph_passes.infra import (
    FusionPass,
    add_initializer,
    constant_value,
    int_attribute,
    integers,
    is_op,
    other_operand,
    static_dim,
    tag,
)
from qwenforge.graph_passes.probe import Probe, input_feeds
from qwenforge.graph_passes.signature import Signature, detect_signature
from qwenforge.graph_passes.subgraph import ancestors, evaluate, leaves

DEFAULT_POSITIONS = 32768
_SAMPLED_PAST = 1000


@dataclass(frozen=True)
class Rotation:
    """One matched rotation of ``x`` [B, H, S, D], ending in ``last``; ``width`` is the tables' last dimension."""

    last: ir.Node
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    width: int


@dataclass(frozen=True)
class Tables:
    """cos and sin [P, D/2] as initializers and the [B, S] positions that select their rows."""

    cos: ir.Value
    sin: ir.Value
    positions: ir.Value


class FuseRotaryEmbedding(FusionPass):
    """Replace every rotation by a ``RotaryEmbedding`` node over [P, D/2] tables shared by all layers.

    Args:
        positions: rows P of the tables, one for each position the model may see.
    """

    name: ClassVar[str] = "rotary_embedding"

    def __init__(self, positions: int = DEFAULT_POSITIONS) -> None:
        super().__init__()
        self.positions = positions

    def run(self, model: ir.Model) -> None:
        tables: dict[tuple[ir.Value, ir.Value], Tables | None] = {}
        for node in list(model.graph):
            if node.domain or node.op_type not in ("Concat", "RotaryEmbedding"):
                continue
            rotation = self._match(node) if node.op_type == "Concat" else self._match_operator(node)
            if rotation is None:
                continue
            key = (_table_root(rotation.cos), _table_root(rotation.sin))
            if key not in tables:
                try:
                    tables[key] = self._make_tables(model, rotation)
                except GraphError as error:
                    self.fail(str(error), rotation.last)
                    tables[key] = None
            found = tables[key]
            if found is not None:
                self._rewrite(model, rotation, found)

    def _match(self, concat: ir.Node) -> Rotation | None:
        """Match from ``Concat(-x[half:], x[:half])`` down to the sum."""
        if len(concat.inputs) != 2:
            return None
        negated = is_op(concat.inputs[0], "Neg")
        if negated is None:
            return None
        upper, lower = negated.inputs[0], concat.inputs[1]
        x = _halves(lower, upper)
        if x is None:
            self.fail("a negated half is joined to something that is not the other half of the same tensor", concat)
            return None
        size = static_dim(x, -1)
        if x.shape is None or len(x.shape) != 4 or size is None or concat.attributes["axis"].as_int() not in (-1, 3):
            self.fail("the rotated tensor is not [batch, heads, sequence, head size] with a known head size", concat)
            return None
        uses = [use for use, _ in concat.outputs[0].uses()]
        if len(uses) != 1 or uses[0].op_type != "Mul":
            self.fail("rotate_half(x) is not multiplied by one table", concat)
            return None
        sin_product = uses[0]
        sin = other_operand(sin_product, concat.outputs[0])
        adds = [use for use, _ in sin_product.outputs[0].uses()]
        if len(adds) != 1 or adds[0].op_type != "Add":
            self.fail("rotate_half(x) * sin is not added to x * cos", concat)
            return None
        cos_product = is_op(other_operand(adds[0], sin_product.outputs[0]), "Mul")
        cos = other_operand(cos_product, x) if cos_product is not None else None
        if cos is None or sin is None:
            self.fail("rotate_half(x) * sin is not added to x * cos of the same x", concat)
            return None
        if not (_lies_along_positions(cos, x) and _lies_along_positions(sin, x)):
            self.fail("cos and sin are not spread over the heads of [batch, heads, sequence, head size]", concat)
            return None
        return Rotation(adds[0], x, cos, sin, size)

    def _match_operator(self, node: ir.Node) -> Rotation | None:
        """Match a ``RotaryEmbedding`` over [B, S, D/2] tables computed at run time."""
        x, cos, sin = node.inputs[:3]
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            return None  # already over tables
        size = static_dim(x, -1)
        if x is None or cos is None or sin is None or x.shape is None or len(x.shape) != 4 or size is None:
            self.fail("the rotated tensor is not [batch, heads, sequence, head size] with a known head size", node)
            return None
        if int_attribute(node, "interleaved", 0) or int_attribute(node, "rotary_embedding_dim", 0) not in (0, size):
            self.fail("the rotation is interleaved or covers only a part of the head", node)
            return None
        return Rotation(node, x, cos, sin, size // 2)

    def _make_tables(self, model: ir.Model, rotation: Rotation) -> Tables:
        width = rotation.width
        source = _position_source([rotation.cos, rotation.sin])
        opset = model.graph.opset_imports[""]
        count = self.positions
        everywhere = self._tables_at(model, rotation, source, np.arange(count)[None], opset)
        for full in everywhere:
            if full.shape != (count, width):
                raise GraphError("cos and sin are not [sequence, head size] tables of the position alone")
        rows = [[count // 3, 2, 2, count - 1, 0], [count // 2, 1, count // 3, count // 4, 1]]
        samples = [np.array(rows[1:]) % count]  # without the first and the last position: no row's extremes matter
        if source.shape is not None and len(source.shape) > 1 and static_dim(source, 0) is None:
            samples.append(np.array(rows) % count)
        past = _SAMPLED_PAST if detect_signature(model).has_past else 0
        halves = []
        for sample in samples:
            again = self._tables_at(model, rotation, source, sample, opset, past)
            if not all(
                np.array_equal(full[sample.reshape(-1)], part) for full, part in zip(everywhere, again, strict=True)
            ):
                raise GraphError("cos and sin depend on more than the position (dynamic scaling is not supported)")
        for full in everywhere:
            half = (static_dim(rotation.x, -1) or 0) // 2
            if width != half and not np.array_equal(full[:, :half], full[:, half:]):
                raise GraphError("the two halves of the cos and sin tables differ (interleaved rotation)")
            halves.append(np.ascontiguousarray(full[:, :half]))
        positions = _position_ids(model, source)
        cos, sin = (
            self._table(model, name, half, value)
            for name, half, value in zip(
                ("rope.cos_cache", "rope.sin_cache"), halves, (rotation.cos, rotation.sin), strict=True
            )
        )
        return Tables(cos, sin, positions)

    def _table(self, model: ir.Model, name: str, half: npt.NDArray[np.generic], value: ir.Value) -> ir.Value:
        """The table as an initializer, behind the same cast to 16 bits as the graph's own cos or sin, if any."""
        table = add_initializer(model, name, ir.tensor(half, name=name))
        cast = is_op(_table_root(value), "Cast")
        if cast is None:
            return table
        node = tag(
            ir.node("Cast", [table], {"to": cast.attributes["to"].as_int()}, name=f"{table.name}.cast"), self.name
        )
        output = node.outputs[0]
        output.name = f"{table.name}.typed"
        output.shape, output.type = table.shape, _table_root(value).type
        model.graph.insert_before(model.graph[0], node)
        return output

    def _tables_at(
        self,
        model: ir.Model,
        rotation: Rotation,
        source: ir.Value,
        positions: npt.NDArray[np.int64],
        opset: int,
        past: int = 0,
    ) -> list[npt.NDArray[np.generic]]:
        """cos and sin, a row for each of ``positions`` [B, S], as they are behind ``past`` cached tokens."""
        values = [_uncast(_table_root(value)) for value in (rotation.cos, rotation.sin)]
        fed = {source: _shaped_like(source, positions)}
        nodes = ancestors(values, [source])
        needed = [leaf for leaf in leaves(nodes, values) if leaf is not source]
        for leaf in needed:
            if not _only_measured(leaf, set(nodes)):
                raise GraphError(f"cos and sin depend on {leaf.name}, not on the position alone")
        fed |= input_feeds(model, Probe(len(positions), past, positions.shape[1]), needed)
        return [table.reshape(-1, table.shape[-1]) for table in _evaluate(values, fed, opset)]

    def _rewrite(self, model: ir.Model, rotation: Rotation, tables: Tables) -> None:
        old = rotation.last.outputs[0]
        node = ir.node(
            "RotaryEmbedding",
            [rotation.x, tables.cos, tables.sin, tables.positions],
            name=f"{rotation.last.name}.rotary_embedding",
        )
        new = tag(node, self.name).outputs[0]
        new.shape, new.type = old.shape, old.type
        model.graph.insert_before(rotation.last, node)
        new.name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.matches += 1


def _halves(lower: ir.Value | None, upper: ir.Value | None) -> ir.Value | None:
    """The tensor whose first and second half of the last axis ``lower`` and ``upper`` are, else None."""
    split = is_op(lower, "Split")
    if split is not None and is_op(upper, "Split") is split and len(split.outputs) == 2:
        sizes = integers(split.inputs[1]) if len(split.inputs) > 1 else None
        given = len(split.inputs) > 1 and split.inputs[1] is not None
        equal = sizes[0] == sizes[1] if sizes is not None else not given
        axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
        ordered = split.outputs[0] is lower and split.outputs[1] is upper
        return split.inputs[0] if equal and ordered and axis in (-1, 3) else None
    first, second = is_op(lower, "Slice"), is_op(upper, "Slice")
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    size = static_dim(first.inputs[0], -1)
    if size is None or size % 2:
        return None
    bounds = []
    for node in (first, second):
        start, end, axes, *last = (integers(value) for value in (*node.inputs[1:], None)[:4])
        steps = last[0] if len(node.inputs) > 4 else [1]
        if start is None or end is None or axes not in ([-1], [3]) or steps != [1]:
            return None
        bounds.append((start[0], min(end[0], size)))
    return first.inputs[0] if bounds == [(0, size // 2), (size // 2, size)] else None


def _table_root(value: ir.Value) -> ir.Value:
    """The table below its Unsqueeze, so that every layer's own Unsqueeze leads to one table."""
    node = is_op(value, "Unsqueeze")
    return node.inputs[0] if node is not None and node.inputs[0] is not None else value


def _uncast(value: ir.Value) -> ir.Value:
    """The fp32 table behind a cast to 16 bits."""
    node = is_op(value, "Cast")
    return node.inputs[0] if node is not None and node.inputs[0] is not None else value


def _position_source(tables: list[ir.Value]) -> ir.Value:
    """The integer positions that cos and sin are computed from: the input of their only Cast from integers."""
    sources = []
    for node in ancestors(tables):
        value = node.inputs[0] if node.op_type == "Cast" and not node.domain else None
        if (
            value is not None
            and value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
            and constant_value(value) is None
        ):
            sources.append(value)
    if len(set(sources)) != 1:
        raise GraphError("cos and sin are not computed from one tensor of integer positions")
    return sources[0]


def _evaluate(
    values: list[ir.Value], feeds: Mapping[ir.Value, npt.NDArray[np.generic]], opset: int
) -> list[npt.NDArray[np.generic]]:
    """:func:`evaluate`, where sizes that the graph has frozen are a reason like any other."""
    try:
        return evaluate(values, feeds, opset)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise GraphError(f"the positions of cos and sin cannot be replaced: {error}") from error


def _only_measured(value: ir.Value, nodes: set[ir.Node]) -> bool:
    """Whether ``nodes`` read the sizes of ``value`` but none of its numbers."""
    readers = [use for use, _ in value.uses() if use in nodes]
    return all(
        node.op_type in ("Shape", "Size")
        or (node.op_type in ("Unsqueeze", "Squeeze", "Identity", "Cast") and _only_measured(node.outputs[0], nodes))
        for node in readers
    )


def _lies_along_positions(table: ir.Value, x: ir.Value) -> bool:
    """Whether ``table``, multiplied with ``x`` [B, H, S, D], has a row for each position, the same for every head."""
    if table.shape is None or len(table.shape) > 4:
        return False
    if len(table.shape) > 2 and static_dim(table, -3) != 1:
        return False
    return static_dim(table, -2) != 1 or static_dim(x, -2) == 1


def _shaped_like(source: ir.Value, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.generic]:
    """``positions`` [B, S] in the layout of ``source``: [S], [B, S], [B, S, 1] or [B, 1, S]."""
    typed: npt.NDArray[np.generic] = positions.astype(np.int32 if source.dtype == ir.DataType.INT32 else np.int64)
    shape = source.shape
    if shape is None or len(shape) not in (1, 2, 3):
        raise GraphError("the positions behind cos and sin have an unknown layout")
    if len(shape) == 1:
        return typed.reshape(-1)
    if len(shape) == 2:
        return typed
    middle = static_dim(source, 1) == 1 and static_dim(source, 2) != 1
    return typed[:, None, :] if middle else typed[:, :, None]


def _checked_positions(value: ir.Value, signature: Signature) -> ir.Value:
    """``value``, if it is the graph's input of positions and has the layout [B, S] of ours."""
    if value.name != signature.position_ids:
        raise GraphError(f"cos and sin are computed from {value.name}, which is not the positions")
    if value.dtype != ir.DataType.INT64 or value.shape is None or len(value.shape) != 2:
        raise GraphError("the graph's positions are not an int64 [batch, sequence] input")
    return value


def _position_ids(model: ir.Model, source: ir.Value) -> ir.Value:
    """The [B, S] positions: the graph input behind ``source``, or a new one if the graph counts them itself."""
    value: ir.Value | None = source
    while value is not None and (node := is_op(value, "Unsqueeze")) is not None:
        value = node.inputs[0]
    signature, opset = detect_signature(model), model.graph.opset_imports[""]
    if value is not None and value.is_graph_input():
        return _checked_positions(value, signature)
    nodes = ancestors([source])
    needed = leaves(nodes, [source])
    for leaf in needed:
        if _only_measured(leaf, set(nodes)) or leaf.name == signature.attention_mask:
            continue  # positions may be counted from sizes or from the padding mask
        given = _checked_positions(leaf, signature)
        sample = np.array([[9, 2, 2, 1 << 20, 0], [7, 1, 3, 4, 1]])
        copied = _evaluate([source], input_feeds(model, Probe(2, 0, 5), needed) | {leaf: sample}, opset)[0]
        if not np.array_equal(copied.reshape(-1), sample.reshape(-1)):
            raise GraphError(f"cos and sin are computed from positions that differ from {leaf.name}")
        return given
    for probe in (Probe(2, 0, 4), Probe(2, 3, 1), Probe(2, 5, 3)):
        try:
            feeds = input_feeds(model, probe, needed)
        except GraphError:
            if probe.past == 0:
                raise
            continue
        counted = _evaluate([source], feeds, opset)[0]
        if counted.size % probe.new or (counted.reshape(-1, probe.new) != probe.past + np.arange(probe.new)).any():
            raise GraphError("the graph's own positions do not count on from the cached tokens")
    for graph_input in model.graph.inputs:
        if graph_input.name == names.POSITION_IDS:
            return graph_input
    created = ir.Value(
        name=names.POSITION_IDS,
        shape=ir.Shape([names.BATCH, names.SEQUENCE]),
        type=ir.TensorType(ir.DataType.INT64),
    )
    model.graph.inputs.append(created)
    return created
