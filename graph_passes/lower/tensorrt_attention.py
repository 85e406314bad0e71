"""``qwenforge::GroupedQueryAttention`` for TensorRT: its own cache and attention layers, or our plugin.

Native, for TensorRT 11 and RTX: rotary embedding, ``TensorScatter`` (TensorRT's cache update layer, in place) and
``TRT_Attention``, which is the parser's name for its attention layer. Its causal mask is anchored at the lower right of
the valid keys: with kv_lengths = cache_position + S, query j of a row sees the keys up to cache_position + j, itself.
The layer has no scale, so that q is scaled before it. It has no sliding window.

Plugin, for TensorRT 10 and for what the native form cannot do: one ``QwenForgeAttention`` node, which updates the
caches in place; see plugins/attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qwenforge import names, op_spec
from qwenforge.errors import UnsupportedError
from qwenforge.graph_passes.functions import GROUPED_QUERY_ATTENTION, QUANTIZED_ATTENTION
from qwenforge.graph_passes.infra import FusionPass, constant, replace_node, static_dim, tag

TENSORRT_DOMAIN = "trt"
"""Of TensorRT's own operators; the parser goes by the name alone."""

TRT_ATTENTION = "TRT_Attention"

_ATTENTION_ATTRIBUTES: dict[str, int | str] = {"causal_kind": "lower_right", "TRT_decomposable": 1}
"""Decomposable: where TensorRT has no fused kernel (fewer than three heads) it takes several instead of failing."""

_INT64 = ir.TensorType(ir.DataType.INT64)
_INT32 = ir.TensorType(ir.DataType.INT32)


def plugin_attributes(
    spec: op_spec.OpSpec, attributes: dict[str, int | float], node: ir.Node
) -> dict[str, int | float | str]:
    """The attributes of a plugin node: its fields, and what the parser finds its creator by.

    Raises:
        UnsupportedError: the plugin does not take these values.
    """
    require_fields(spec, attributes, node)
    return {**attributes, "plugin_version": spec.version, "plugin_namespace": op_spec.NAMESPACE}


def require_fields(spec: op_spec.OpSpec, fields: dict[str, int | float], node: ir.Node) -> None:
    """Make sure that ``fields`` are what ``spec`` allows.

    Raises:
        UnsupportedError: they are not; the message names the node.
    """
    if (problem := spec.problem(fields)) is not None:
        raise UnsupportedError(f"the plugin {spec.name} cannot compute node {node.name}: {problem}.")


def _calls(model: ir.Model) -> list[ir.Node]:
    kinds = (GROUPED_QUERY_ATTENTION, QUANTIZED_ATTENTION)
    return [node for node in model.graph if node.op_type in kinds and node.domain == names.DOMAIN]


class PluginAttention(FusionPass):
    """Replace every attention function by the plugin."""

    name: ClassVar[str] = "tensorrt_plugin_attention"

    def run(self, model: ir.Model) -> None:
        spec = op_spec.load("attention")
        narrowed: dict[ir.Value, ir.Value] = {}
        for node in _calls(model):
            head_size = static_dim(node.inputs[3], -1)
            if head_size is None:
                self.fail("the head size is not static", node)
                continue
            attributes = self.node_attributes(spec, attention_fields(node, head_size), node)
            for index in (7, 8):  # position_ids, cache_position
                value = node.inputs[index]
                if value is None:
                    raise UnsupportedError(f"node {node.name} has no {('position_ids', 'cache_position')[index - 7]}.")
                if value not in narrowed:
                    narrowed[value] = _narrow(model, value, node, self.name)
                node.replace_input_with(index, narrowed[value])
            if attributes["cache_type"]:
                _hold_bytes(node)
            plugin = ir.node(
                spec.name,
                self.place(list(node.inputs)),
                attributes,
                domain=op_spec.NAMESPACE,
                num_outputs=len(spec.outputs),
                name=node.name,
            )
            replace_node(model, node, [tag(plugin, self.name)], plugin.outputs)
            model.graph.opset_imports[op_spec.NAMESPACE] = 1
            self.matches += 1

    def place(self, inputs: list[ir.Value | None]) -> list[ir.Value | None]:
        """The inputs, scales of 8-bit caches last, as the target lists them: TensorRT's those that are there."""
        return inputs

    def node_attributes(
        self, spec: op_spec.OpSpec, fields: dict[str, int | float], node: ir.Node
    ) -> dict[str, int | float | str]:
        """What the node is given: ``fields``, and here what TensorRT's parser finds the plugin by."""
        return plugin_attributes(spec, fields, node)


_CACHE_TYPES = {ir.DataType.FLOAT8E4M3FN: 1, ir.DataType.INT8: 2}
"""``cache_type`` of the plugin by what an 8-bit cache holds."""


def _cache_type(call: ir.Node) -> int:
    if call.op_type != QUANTIZED_ATTENTION:
        return 0
    past = call.inputs[3]
    assert past is not None and past.dtype is not None
    return _CACHE_TYPES[past.dtype]


def _hold_bytes(call: ir.Node) -> None:
    """Type FP8 caches as the INT8 of the same bytes, which is how the plugin takes them."""
    for value in (*call.inputs[3:5], *call.outputs[1:3]):
        if value is not None:
            value.type = ir.TensorType(ir.DataType.INT8)


def attention_fields(call: ir.Node, head_size: int) -> dict[str, int | float]:
    """The fields of ``QwenForgeAttention`` for the function ``call``: q, k and v apart, linear caches."""
    return {
        "num_heads": call.attributes["num_heads"].as_int(),
        "num_key_value_heads": call.attributes["num_key_value_heads"].as_int(),
        "head_size": head_size,
        "scale": call.attributes["scale"].as_float(),
        "sliding_window": call.attributes["sliding_window"].as_int(),
        "cache_type": _cache_type(call),
        "page_size": 0,
        "packed_qkv": 0,
        "qk_norm": 0,
        "epsilon": 0.0,
    }


class NativeAttention(FusionPass):
    """Replace every attention function without a sliding window by TensorRT's own layers."""

    name: ClassVar[str] = "tensorrt_native_attention"

    def run(self, model: ir.Model) -> None:
        lengths: dict[tuple[ir.Value | None, ir.Value | None], ir.Value] = {}
        for node in _calls(model):
            if node.op_type == QUANTIZED_ATTENTION:
                raise UnsupportedError(
                    f"the cache of node {node.name} is of 8 bits, and TensorRT's own attention has none; use "
                    "--attention plugin, or leave the cache unquantized."
                )
            if node.attributes["sliding_window"].as_int():
                self.fail("the attention layer has no sliding window: the plugin computes it", node)
                continue
            caches = [*node.inputs[3:5], *node.outputs[1:]]
            if not all(cache is not None and (cache.is_graph_input() or cache.is_graph_output()) for cache in caches):
                self.fail("the cache is not an input and an output of the network", node)
                continue
            source = (node.inputs[7], node.inputs[8])
            if source not in lengths:
                lengths[source] = _valid_keys(model, node, self.name)
            self._rewrite(model, node, lengths[source])
            self.matches += 1

    def _rewrite(self, model: ir.Model, node: ir.Node, valid_keys: ir.Value) -> None:
        q, k, v, past_key, past_value, cos, sin, position_ids, cache_position = node.inputs
        heads, kv_heads = node.attributes["num_heads"].as_int(), node.attributes["num_key_value_heads"].as_int()
        builder = _Builder(model, node, self.name)
        rotated = [
            builder.add(
                "RotaryEmbedding", [builder.split(value, count, role), cos, sin, position_ids], f"rotary_{role}"
            )
            for value, count, role in ((q, heads, "q"), (k, kv_heads, "k"))
        ]
        scaled = builder.scale(rotated[0], node.attributes["scale"].as_float())
        written: dict[str, int | str] = {"axis": -2, "mode": "linear"}
        new_key = builder.add("TensorScatter", [past_key, rotated[1], cache_position], "key_cache", written)
        new_value = builder.add(
            "TensorScatter", [past_value, builder.split(v, kv_heads, "v"), cache_position], "value_cache", written
        )
        attended = builder.add(
            TRT_ATTENTION,
            [scaled, new_key, new_value, None, None, valid_keys],
            "attended",
            _ATTENTION_ATTRIBUTES,
            domain=TENSORRT_DOMAIN,
        )
        joined = builder.add("Transpose", [attended], "joined", {"perm": [0, 2, 1, 3]})
        y = builder.add("Reshape", [joined, constant(model, "attention.joined_shape", [0, 0, -1])], "flat")
        builder.finish([y, new_key, new_value])
        model.graph.opset_imports[TENSORRT_DOMAIN] = 1


class _Builder:
    """Collects the nodes that replace ``node``, named and typed after it."""

    def __init__(self, model: ir.Model, node: ir.Node, rule: str) -> None:
        self._model, self._node, self._rule = model, node, rule
        self._type = node.outputs[0].type
        self._new: list[ir.Node] = []

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        role: str,
        attributes: Mapping[str, int | str | Sequence[int]] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        new = ir.node(op, inputs, attributes or {}, domain=domain, name=f"{self._node.name}.{role}")
        new.outputs[0].name, new.outputs[0].type = f"{new.name}.output", self._type
        self._new.append(tag(new, self._rule))
        return new.outputs[0]

    def split(self, value: ir.Value | None, heads: int, role: str) -> ir.Value:
        """[B, S, H*D] -> [B, H, S, D]."""
        shape = constant(self._model, f"attention.split_shape.{heads}", [0, 0, heads, -1])
        apart = self.add("Reshape", [value, shape], f"split_{role}")
        return self.add("Transpose", [apart], f"heads_{role}", {"perm": [0, 2, 1, 3]})

    def scale(self, value: ir.Value, factor: float) -> ir.Value:
        """``value`` times ``factor``, multiplied in fp32 unless 16 bits hold the factor exactly.

        Rounded to 16 bits, 1 / sqrt(128) would be off by up to 1 in 500, in every head of every layer in the same way.
        """
        kind = value.dtype
        assert kind is not None
        exact = float(np.array(factor, kind.numpy())) == np.float32(factor)
        if exact:
            return self.add(
                "Mul",
                [value, constant(self._model, f"attention.scale.{kind.name.lower()}", np.array(factor, kind.numpy()))],
                "scaled",
            )
        wide = self.add("Cast", [value], "widened", {"to": ir.DataType.FLOAT.value})
        product = self.add(
            "Mul", [wide, constant(self._model, "attention.scale", np.array(factor, np.float32))], "scaled"
        )
        wide.type = product.type = ir.TensorType(ir.DataType.FLOAT)
        return self.add("Cast", [product], "narrowed", {"to": kind.value})

    def finish(self, outputs: Sequence[ir.Value]) -> None:
        replace_node(self._model, self._node, self._new, outputs)


def _narrow(model: ir.Model, value: ir.Value, user: ir.Node, rule: str) -> ir.Value:
    """``value`` as int32."""
    if value.dtype == ir.DataType.INT32:
        return value
    cast = ir.node("Cast", [value], {"to": ir.DataType.INT32.value}, name=f"attention.{value.name}.int32")
    cast.outputs[0].name = f"{cast.name}.output"
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, _INT32
    model.graph.insert_before(model.graph[0] if value.is_graph_input() else user, tag(cast, rule))
    return cast.outputs[0]


def _valid_keys(model: ir.Model, attention: ir.Node, rule: str) -> ir.Value:
    """The keys that count for each row, cache_position [B] + S, int32."""
    positions, starts = attention.inputs[7], attention.inputs[8]
    count = ir.node("Shape", [positions], {"start": 1, "end": 2}, name="attention.new_tokens")
    end = ir.node("Add", [starts, count.outputs[0]], name="attention.valid_keys")
    narrowed = ir.node("Cast", [end.outputs[0]], {"to": ir.DataType.INT32.value}, name="attention.valid_keys.int32")
    rows = ir.Shape([names.BATCH])
    for node, shape, kind in ((count, ir.Shape([1]), _INT64), (end, rows, _INT64), (narrowed, rows, _INT32)):
        tag(node, rule)
        node.outputs[0].name = f"{node.name}.output"
        node.outputs[0].shape, node.outputs[0].type = shape, kind
    given = all(value is not None and value.is_graph_input() for value in (positions, starts))
    model.graph.insert_before(model.graph[0] if given else attention, [count, end, narrowed])
    return narrowed.outputs[0]
