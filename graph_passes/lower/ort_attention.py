"""``qwenforge::GroupedQueryAttention`` -> ``com.microsoft::GroupQueryAttention`` over one shared cache buffer.

ONNX Runtime 1.32's CPU kernel rotates q and k itself when the head size is a multiple of 16; for a multiple of 8 the
rotation stays outside, and other head sizes keep the function. Padding tokens count as tokens (``seqlens_k`` is
``cache_position + S - 1`` for every row): they stand behind the valid ones, so causality hides them.

One thing the kernel does not do, and refuses when it runs ("batch_size must be 1 when sequence_length > 1 and past
context is given"): several new tokens for several rows whose caches are part-filled. The runtime prefills such rows one
by one, on views of the cache. An ``If`` with the function in its other branch would take them together at 4 us a layer,
but hides every attention node in a subgraph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.functions import GROUPED_QUERY_ATTENTION
from qwenforge.graph_passes.infra import FusionPass, constant, replace_node, static_dim, tag

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Lengths:
    """Values that every attention node shares: valid keys - 1 of each row [B], and the most of any row [], int32."""

    last_key: ir.Value
    total: ir.Value


class LowerAttention(FusionPass):
    """Replace every attention function whose head size the kernel takes."""

    name: ClassVar[str] = "ort_attention"

    def run(self, model: ir.Model) -> None:
        calls = [n for n in model.graph if n.op_type == GROUPED_QUERY_ATTENTION and n.domain == names.DOMAIN]
        known: dict[tuple[ir.Value | None, ir.Value | None], Lengths] = {}
        for node in calls:
            size = static_dim(node.inputs[3], -1)
            if size is None or size % 8:
                self.fail(
                    f"a head size of {size} is no multiple of 8: the attention runs from standard operators", node
                )
                continue
            source = (node.inputs[7], node.inputs[8])
            if source not in known:
                known[source] = _lengths(model, node, self.name)
            self._rewrite(model, node, known[source], rotates=size % 16 == 0)

    def _rewrite(self, model: ir.Model, node: ir.Node, lengths: Lengths, *, rotates: bool) -> None:
        q, k, v, past_key, past_value, cos, sin, position_ids, _ = node.inputs
        heads, kv_heads = node.attributes["num_heads"].as_int(), node.attributes["num_key_value_heads"].as_int()
        new_nodes: list[ir.Node] = []
        if not rotates:
            rotated = []
            for value, count, role in ((q, heads, "q"), (k, kv_heads, "k")):
                rotation = ir.node(
                    "RotaryEmbedding",
                    [value, cos, sin, position_ids],
                    {"num_heads": count},
                    name=f"{node.name}.rotary_{role}",
                )
                assert value is not None
                rotation.outputs[0].name = f"{rotation.name}.output"
                rotation.outputs[0].shape, rotation.outputs[0].type = value.shape, value.type
                new_nodes.append(tag(rotation, self.name))
                rotated.append(rotation.outputs[0])
            q, k = rotated
        window = node.attributes["sliding_window"].as_int()
        attention = ir.node(
            "GroupQueryAttention",
            [q, k, v, past_key, past_value, lengths.last_key, lengths.total]
            + ([cos, sin, position_ids] if rotates else []),
            {
                "num_heads": heads,
                "kv_num_heads": kv_heads,
                "scale": node.attributes["scale"].as_float(),
                "local_window_size": window or -1,
                "do_rotary": int(rotates),
            },
            domain=MICROSOFT,
            num_outputs=3,
            name=node.name,
        )
        new_nodes.append(tag(attention, self.name))
        replace_node(model, node, new_nodes, attention.outputs)
        model.graph.opset_imports[MICROSOFT] = 1
        self.matches += 1


def _lengths(model: ir.Model, attention: ir.Node, rule: str) -> Lengths:
    """Compute the lengths from ``attention``'s position_ids [B, S] and cache_position [B]."""
    positions, starts = attention.inputs[7], attention.inputs[8]
    one = constant(model, "attention.one", np.array([1], np.int32))
    count = ir.node("Shape", [positions], {"start": 1, "end": 2}, name="attention.new_tokens")
    end = ir.node("Add", [starts, count.outputs[0]], name="attention.end")
    narrowed = ir.node("Cast", [end.outputs[0]], {"to": ir.DataType.INT32.value}, name="attention.end.int32")
    last = ir.node("Sub", [narrowed.outputs[0], one], name="attention.last_key")
    total = ir.node("ReduceMax", [narrowed.outputs[0]], {"keepdims": 0}, name="attention.total")
    nodes = [count, end, narrowed, last, total]
    rows, integer, narrow = ir.Shape([names.BATCH]), ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.INT32)
    shapes = (ir.Shape([1]), rows, rows, rows, ir.Shape([]))
    for node, shape, kind in zip(nodes, shapes, (integer, integer, narrow, narrow, narrow), strict=True):
        tag(node, rule)
        node.outputs[0].name = f"{node.name}.output"
        node.outputs[0].shape, node.outputs[0].type = shape, kind
    given = all(value is not None and value.is_graph_input() for value in (positions, starts))
    model.graph.insert_before(model.graph[0] if given else attention, nodes)
    return Lengths(last.outputs[0], total.outputs[0])
