"""Grouped-query attention: projections to attention output, cache included -> ``qwenforge::GroupedQueryAttention``.

Matches eager attention (MatMul, scale, mask, Softmax, MatMul), torchlib's decomposition of
``scaled_dot_product_attention`` and the ONNX ``Attention`` op, with or without repeated key/value heads, over a cache
that grows by concatenation or none at all. The mask is proven causal by :mod:`causal_mask`. All layers are rewritten
together, because the cache's form is part of the model's signature: afterwards the cache is a fixed-capacity buffer
written in place, the padding mask input is gone and ``cache_position`` says where the new tokens go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qwenforge import names
from qwenforge.errors import GraphError
from qwenforge.graph_passes.functions import register_function
from qwenforge.graph_passes.fuse.causal_mask import CausalMask, prove_causal, trial
from qwenforge.graph_passes.infra import (
    FusionPass,
    constant,
    float_attribute,
    int_attribute,
    integers,
    ints_attribute,
    is_op,
    layer_scope,
    scalar,
    static_dim,
    tag,
)
from qwenforge.graph_passes.probe import Probe, input_feeds
from qwenforge.graph_passes.signature import LayerCache, Signature, detect_signature
from qwenforge.graph_passes.subgraph import ancestors, leaves

OP = "GroupedQueryAttention"


@dataclass(frozen=True)
class Scores:
    """Attention before its heads are resolved: softmax(scale * q @ k^T + mask) @ v.

    ``transposed`` is k^T where it is more than one Transpose of ``key``; ``counted`` is a boolean mask whose rows
    without a visible key make the output zero.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value
    scale: float
    output: ir.Value
    transposed: ir.Value | None = None
    counted: ir.Value | None = None


@dataclass(frozen=True)
class Heads:
    """A [B, S, H*D] projection that reaches attention as [B, H, S, D]; ``normed`` when a per-head norm is between."""

    projection: ir.Value
    num_heads: int
    head_size: int
    normed: bool


@dataclass(frozen=True)
class Layer:
    """Everything the fused node of one layer needs."""

    anchor: ir.Node
    rotary: ir.Node
    query: Heads
    key: Heads
    value: Heads
    cache: LayerCache
    scale: float
    mask: CausalMask
    output: ir.Value


class FuseGroupedQueryAttention(FusionPass):
    """Fuse the attention of every layer, or of none."""

    name: ClassVar[str] = "grouped_query_attention"

    def run(self, model: ir.Model) -> None:
        anchors = [node for node in model.graph if _is_anchor(node)]
        if not anchors:
            return
        signature = detect_signature(model)
        proven: dict[ir.Value, CausalMask] = {}
        layers = []
        for anchor in anchors:
            try:
                layers.append(_match_layer(model, anchor, signature, proven))
            except GraphError as error:
                self.fail(str(error), anchor)
        if self.failures:
            return
        if sorted(layer.cache.key_output for layer in layers) != sorted(c.key_output for c in signature.layers):
            self.fail("the graph returns a cache that no attention of it made")
            return
        if signature.cache_position is not None:
            self.fail(f"the graph has an input {signature.cache_position} of its own")
            return
        leftover = _other_uses(model, layers, signature)
        if leftover:
            self.fail(f"graph input {leftover} has a use besides attention")
            return
        _rewrite(model, layers, signature, self.name)
        self.matches = len(layers)


def _other_uses(model: ir.Model, layers: list[Layer], signature: Signature) -> str | None:
    """A cache or mask input that something outside the fused attention reads."""
    merged = [layer.output for layer in layers]
    operands = [part.projection for layer in layers for part in (layer.query, layer.key, layer.value)]
    operands += [value for layer in layers for value in layer.rotary.inputs[1:4] if value is not None]
    logits = [value for value in model.graph.outputs if value.name == signature.logits]
    kept = ancestors([*logits, *operands], stop=merged)
    return next((value.name for value in leaves(kept, []) if value.name in _replaced_inputs(signature)), None)


def _replaced_inputs(signature: Signature) -> set[str]:
    inputs = {name for layer in signature.layers for name in (layer.key_input, layer.value_input) if name}
    return inputs | ({signature.attention_mask} if signature.attention_mask else set())


def _is_anchor(node: ir.Node) -> bool:
    """Softmax over 4-D scores, or an ``Attention`` op."""
    if node.domain or node.op_type not in ("Softmax", "Attention"):
        return False
    shape = node.outputs[0].shape
    return node.op_type == "Attention" or shape is None or len(shape) == 4


def _match_layer(model: ir.Model, anchor: ir.Node, signature: Signature, proven: dict[ir.Value, CausalMask]) -> Layer:
    scores = _attention_op(anchor) if anchor.op_type == "Attention" else _softmax_attention(anchor)
    rotary = is_op(scores.query, "RotaryEmbedding")
    if rotary is None or len(rotary.inputs) < 4 or rotary.inputs[3] is None:
        raise GraphError("the query is not rotated by a RotaryEmbedding over tables of all positions")
    key, value = _without_repeat(scores.key), _without_repeat(scores.value)
    cache = _cache_of(key, value, signature)
    key_new, value_new = _appended(key, cache.key_input), _appended(value, cache.value_input)
    key_rotary = is_op(key_new, "RotaryEmbedding")
    if key_rotary is None:
        raise GraphError("the key is not rotated by a RotaryEmbedding")
    if list(key_rotary.inputs[1:4]) != list(rotary.inputs[1:4]):
        raise GraphError("query and key are rotated by different tables or positions")
    query_heads = _heads(rotary.inputs[0])
    for role, node in (("query", rotary), ("key", key_rotary)):
        part = int_attribute(node, "rotary_embedding_dim", 0)
        if int_attribute(node, "interleaved", 0) or part not in (0, query_heads.head_size):
            raise GraphError(f"the {role} is rotated in pairs or in part, not in halves")
    key_heads, value_heads = _heads(key_rotary.inputs[0]), _heads(value_new)
    if key_heads.num_heads != value_heads.num_heads or query_heads.num_heads % key_heads.num_heads:
        raise GraphError(
            f"{query_heads.num_heads} query heads cannot share "
            f"{key_heads.num_heads} key and {value_heads.num_heads} value heads"
        )
    if len({query_heads.head_size, key_heads.head_size, value_heads.head_size}) != 1:
        raise GraphError("query, key and value have different head sizes")
    if scores.transposed is not None:
        _prove_transposed(model, scores, query_heads, signature)
    for mask in (scores.mask, scores.counted):
        if mask is not None and mask not in proven:
            proven[mask] = prove_causal(model, mask, signature)
    output = _merged_output(scores.output, query_heads)
    return Layer(anchor, rotary, query_heads, key_heads, value_heads, cache, scores.scale, proven[scores.mask], output)


def _attention_op(node: ir.Node) -> Scores:
    query, key, value = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if any(extra is not None for extra in node.inputs[4:]) or len(node.outputs) > 1:
        raise GraphError("the Attention op keeps a cache of its own")
    if int_attribute(node, "is_causal", 0) or mask is None:
        raise GraphError("the Attention op has no mask of its own (is_causal is upper-left aligned)")
    if float_attribute(node, "softcap", 0.0) or "q_num_heads" in node.attributes:
        raise GraphError("the Attention op uses softcap or 3-D inputs")
    if query is None or key is None or value is None:
        raise GraphError("the Attention op lacks an input")
    size = static_dim(query, -1)
    if "scale" not in node.attributes and size is None:
        raise GraphError("the Attention op has neither a scale nor a known head size")
    scale = float_attribute(node, "scale", 1.0 if size is None else size**-0.5)
    output, counted = _past_unattended_guard(node.outputs[0])
    return Scores(query, key, value, mask, scale, output, counted=counted)


def _softmax_attention(softmax: ir.Node) -> Scores:
    masked = is_op(_through(softmax.inputs[0], "Cast"), "Add")
    if masked is None or int_attribute(softmax, "axis", -1) not in (-1, 3):
        raise GraphError("the scores have no mask added before a softmax over the keys")
    mask = masked.inputs[1]
    product, scale = _unscaled(masked.inputs[0])
    if product is None:
        mask = masked.inputs[0]
        product, scale = _unscaled(masked.inputs[1])
    if product is None or mask is None:
        raise GraphError("the softmax is not over query @ key^T plus a mask")
    query, query_scale = _scaled(product.inputs[0])
    transposed, key_scale = _scaled(product.inputs[1])
    key = _untransposed(transposed)
    weights: ir.Value = softmax.outputs[0]
    while (following := _sole_use(weights)) is not None and following.op_type == "Cast":
        weights = following.outputs[0]
    if following is None:
        following, weights = _nan_guard(weights)
    if following.op_type != "MatMul" or following.inputs[0] is not weights or following.inputs[1] is None:
        raise GraphError("the softmax is not multiplied by the values")
    output, counted = _past_unattended_guard(following.outputs[0])
    detour = None if is_op(transposed, "Transpose") is not None else transposed
    scale *= query_scale * key_scale
    return Scores(query, key, following.inputs[1], mask, scale, output, detour, counted)


def _sole_use(value: ir.Value) -> ir.Node | None:
    users = list(dict.fromkeys(node for node, _ in value.uses()))
    return users[0] if len(users) == 1 else None


def _nan_guard(weights: ir.Value) -> tuple[ir.Node, ir.Value]:
    """torchlib's ``Where(IsNaN(w), 0, w)``: the identity for a query that sees at least itself."""
    users = list(dict.fromkeys(node for node, _ in weights.uses()))
    where = next((node for node in users if node.op_type == "Where"), None)
    test = is_op(where.inputs[0], "IsNaN") if where is not None else None
    if where is None or test is None or len(users) != 2 or test.inputs[0] is not weights:
        raise GraphError("the softmax has an unexpected second use")
    if where.inputs[2] is not weights or scalar(where.inputs[1]) != 0:
        raise GraphError("the softmax is replaced by something other than zero where it is not a number")
    guarded = where.outputs[0]
    while (following := _sole_use(guarded)) is not None and following.op_type == "Cast":
        guarded = following.outputs[0]
    if following is None:
        raise GraphError("the softmax is not multiplied by the values")
    return following, guarded


def _past_unattended_guard(output: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Skip ``Where(row sees nothing, 0, output)``, the identity if the mask it counts is causal; also that mask."""
    where = _sole_use(output)
    if where is None or where.op_type != "Where" or where.inputs[2] is not output or scalar(where.inputs[1]) != 0:
        return output, None
    less = is_op(where.inputs[0], "Less")
    total = is_op(_uncast(less.inputs[0]), "ReduceSum") if less is not None else None
    counted = _uncast(total.inputs[0]) if total is not None else None
    if (
        less is None
        or total is None
        or counted is None
        or scalar(less.inputs[1]) != 1
        or counted.dtype != ir.DataType.BOOL
        or integers(total.inputs[1] if len(total.inputs) > 1 else None) not in ([-1], [3])
        or not int_attribute(total, "keepdims", 1)
    ):
        raise GraphError("the attention output is replaced by zero under an unknown condition")
    return where.outputs[0], counted


def _uncast(value: ir.Value | None) -> ir.Value | None:
    while (cast := is_op(value, "Cast")) is not None:
        value = cast.inputs[0]
    return value


def _through(value: ir.Value | None, op_type: str) -> ir.Value | None:
    node = is_op(value, op_type)
    return node.inputs[0] if node is not None else value


def _unscaled(scored: ir.Value | None) -> tuple[ir.Node | None, float]:
    """The MatMul behind an optional multiplication or division by a constant."""
    product = is_op(_through(scored, "Cast"), "MatMul")
    if product is not None or scored is None:
        return product, 1.0
    operand, factor = _scaled(scored)
    return is_op(operand, "MatMul"), factor


def _scaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """The operand and the factor of a multiplication or division by a constant; otherwise the value and 1."""
    if value is None:
        raise GraphError("query @ key^T lacks an operand")
    multiply, divide = is_op(value, "Mul"), is_op(value, "Div")
    for node, operand, factor in ((multiply, 0, 1), (multiply, 1, 0), (divide, 0, 1)):
        if node is not None and (number := scalar(node.inputs[factor])) and (inner := node.inputs[operand]) is not None:
            return inner, number if node is multiply else 1.0 / number
    return value, 1.0


def _untransposed(value: ir.Value) -> ir.Value:
    """K from K^T: a Transpose of the last axes, plain or through torchlib's 3-D detour."""
    node = is_op(value, "Transpose")
    if node is not None and ints_attribute(node, "perm") == [0, 1, 3, 2] and node.inputs[0] is not None:
        return node.inputs[0]
    outer = is_op(value, "Reshape")
    middle = is_op(outer.inputs[0], "Transpose") if outer is not None else None
    inner = is_op(middle.inputs[0], "Reshape") if middle is not None else None
    source = inner.inputs[0] if inner is not None else None
    if middle is not None and source is not None and ints_attribute(middle, "perm") == [0, 2, 1]:
        return source
    raise GraphError("the query is not multiplied by a transposed key")


def _prove_transposed(model: ir.Model, scores: Scores, heads: Heads, signature: Signature) -> None:
    """Compute K^T for a few tokens: the Reshapes of a detour could as well mix heads and tokens."""
    assert scores.transposed is not None
    batch = static_dim(scores.key, 0) or 2
    probe = Probe(batch, 2, 1) if signature.has_past else Probe(batch, 0, 3)
    shape = (batch, heads.num_heads, probe.past + probe.new, heads.head_size)
    dtype = np.dtype(np.float32) if scores.key.dtype is None else scores.key.dtype.numpy()
    key = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    inner = ancestors([scores.transposed], stop=[scores.key])
    others = [value for value in leaves(inner, [scores.transposed]) if value is not scores.key]
    feeds = {scores.key: key, **input_feeds(model, probe, others, signature)}
    (turned,) = trial([scores.transposed], feeds, model.graph.opset_imports[""])
    if not np.array_equal(turned, key.swapaxes(2, 3)):
        raise GraphError("the query is not multiplied by a transposed key")


def _without_repeat(value: ir.Value) -> ir.Value:
    """The [B, Hk, L, D] tensor behind ``repeat_kv`` (Unsqueeze 2, Expand, Reshape), or the value itself."""
    reshape = is_op(value, "Reshape")
    expand = is_op(reshape.inputs[0], "Expand") if reshape is not None else None
    if expand is None:
        return value
    unsqueeze = is_op(expand.inputs[0], "Unsqueeze")
    if unsqueeze is None or integers(unsqueeze.inputs[1]) != [2] or unsqueeze.inputs[0] is None:
        raise GraphError("the heads are repeated along another axis than next to the key/value head")
    return unsqueeze.inputs[0]


def _cache_of(key: ir.Value, value: ir.Value, signature: Signature) -> LayerCache:
    for cache in signature.layers:
        if (key.name, value.name) == (cache.key_output, cache.value_output):
            return cache
    raise GraphError("the attended keys and values are not a cache that the graph returns")


def _appended(value: ir.Value, cache_input: str | None) -> ir.Value:
    """The new tokens' part of concat(past, new) on the sequence axis."""
    if cache_input is None:
        return value
    node = is_op(value, "Concat")
    if node is None or len(node.inputs) != 2 or node.attributes["axis"].as_int() not in (-2, 2):
        raise GraphError("the cache does not grow by concatenation along the sequence")
    past, new = node.inputs
    if past is None or new is None or past.name != cache_input:
        raise GraphError("the new tokens are not appended behind the cached ones")
    return new


def _heads(value: ir.Value | None) -> Heads:
    """Resolve Transpose(0,2,1,3)(Reshape(projection)), with a per-head RMSNormalization between them if any."""
    transpose = is_op(value, "Transpose")
    if transpose is None or ints_attribute(transpose, "perm") != [0, 2, 1, 3]:
        raise GraphError("the heads are not transposed from [batch, sequence, heads, head size]")
    split = transpose.inputs[0]
    norm = is_op(split, "RMSNormalization")
    reshape = is_op(norm.inputs[0] if norm is not None else split, "Reshape")
    num_heads, size = static_dim(split, 2), static_dim(split, 3)
    if reshape is None or num_heads is None or size is None or split is None or reshape.inputs[0] is None:
        raise GraphError("the heads are not a reshaped projection of known sizes")
    projection = reshape.inputs[0]
    if static_dim(projection, -1) != num_heads * size or projection.shape is None or len(projection.shape) != 3:
        raise GraphError("the heads do not come from a [batch, sequence, heads * head size] projection")
    return Heads(split if norm is not None else projection, num_heads, size, norm is not None)


def _merged_output(output: ir.Value, heads: Heads) -> ir.Value:
    """The [B, S, Hq*D] value after the heads are joined again."""
    node = _sole_use(output)
    if node is not None and node.op_type == "Reshape" and static_dim(node.outputs[0], 1) == heads.num_heads:
        node = _sole_use(node.outputs[0])  # a Reshape to the same [B, H, S, D]
    if node is None or node.op_type != "Transpose" or ints_attribute(node, "perm") != [0, 2, 1, 3]:
        raise GraphError("the attention output is not transposed back to [batch, sequence, heads, head size]")
    reshape = _sole_use(node.outputs[0])
    if reshape is not None and reshape.op_type == "Reshape" and len(reshape.outputs[0].shape or ()) == 4:
        reshape = _sole_use(reshape.outputs[0])
    if reshape is None or reshape.op_type != "Reshape":
        raise GraphError("the attention output's heads are not joined by a Reshape")
    merged = reshape.outputs[0]
    if merged.is_graph_output():
        raise GraphError("the joined attention output is the graph's output")
    if (
        merged.shape is None
        or len(merged.shape) != 3
        or static_dim(merged, -1) not in (None, heads.num_heads * heads.head_size)
    ):
        raise GraphError("the joined attention output is not [batch, sequence, heads * head size]")
    return merged


def _rewrite(model: ir.Model, layers: list[Layer], signature: Signature, rule: str) -> None:
    register_function(model, OP)
    cache_position = ir.Value(
        name=names.CACHE_POSITION, shape=ir.Shape([names.BATCH]), type=ir.TensorType(ir.DataType.INT64)
    )
    order = [cache.key_output for cache in signature.layers]
    caches: dict[str, ir.Value] = {}
    for index, layer in enumerate(sorted(layers, key=lambda layer: order.index(layer.cache.key_output))):
        outputs = _fused_node(model, layer, index, cache_position, rule, caches)
        _replace_outputs(model, layer.cache, outputs)
    _replace_inputs(model, signature, cache_position, caches)


def _fused_node(
    model: ir.Model, layer: Layer, index: int, cache_position: ir.Value, rule: str, caches: dict[str, ir.Value]
) -> ir.Node:
    heads, size = layer.key.num_heads, layer.key.head_size
    dtype = layer.output.dtype or layer.query.projection.dtype
    assert dtype is not None
    past = []
    for name in (names.past_key(index), names.past_value(index)):
        shape = ir.Shape([names.BATCH, heads, names.CAPACITY, size])
        caches[name] = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
        past.append(caches[name])
    scope = layer_scope(layer.output) or f"model.layers.{index}."
    operands = [
        _flat(model, part, layer.anchor, scope, role, rule)
        for part, role in ((layer.query, "q"), (layer.key, "k"), (layer.value, "v"))
    ]
    node = ir.node(
        OP,
        [*operands, *past, *layer.rotary.inputs[1:4], cache_position],
        {
            "num_heads": layer.query.num_heads,
            "num_key_value_heads": heads,
            "scale": float(layer.scale),
            "sliding_window": layer.mask.sliding_window,
        },
        domain=names.DOMAIN,
        num_outputs=3,
        name=f"{scope}self_attn.attention",
    )
    tag(node, rule)
    output, present_key, present_value = node.outputs
    output.shape, output.type = layer.output.shape, ir.TensorType(dtype)
    model.graph.insert_before(layer.output.producer(), node)  # type: ignore[arg-type]
    output.name, layer.output.name = layer.output.name, None
    layer.output.replace_all_uses_with(output)
    for present, name in ((present_key, names.present_key(index)), (present_value, names.present_value(index))):
        present.name = name
        present.shape = ir.Shape([names.BATCH, heads, names.CAPACITY, size])
        present.type = ir.TensorType(dtype)
    return node


def _flat(model: ir.Model, heads: Heads, anchor: ir.Node, scope: str, role: str, rule: str) -> ir.Value:
    """[B, S, H*D] for the fused node; a per-head norm is joined again by a Reshape."""
    if not heads.normed:
        return heads.projection
    width = heads.num_heads * heads.head_size
    shape = constant(model, f"joined_heads.{width}", np.array([0, 0, width], np.int64))
    node = tag(ir.node("Reshape", [heads.projection, shape], name=f"{scope}self_attn.{role}_norm.join"), rule)
    value = node.outputs[0]
    old = heads.projection.shape
    value.name = f"{scope}self_attn.{role}_norm.joined"
    value.shape = ir.Shape([old[0], old[1], width]) if old is not None else None
    value.type = heads.projection.type
    producer = heads.projection.producer()
    assert producer is not None
    model.graph.insert_after(producer, node)
    return value


def _replace_outputs(model: ir.Model, cache: LayerCache, node: ir.Node) -> None:
    for position, value in enumerate(model.graph.outputs):
        if value.name in (cache.key_output, cache.value_output) and value.producer() is not node:
            new = node.outputs[1 if value.name == cache.key_output else 2]
            final = new.name
            value.name = None
            model.graph.outputs[position] = new
            new.name = final


def _replace_inputs(
    model: ir.Model, signature: Signature, cache_position: ir.Value, caches: dict[str, ir.Value]
) -> None:
    """Growing-cache inputs and the padding mask go; fixed-capacity buffers and ``cache_position`` come."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model.graph.inputs.append(cache_position)
    RemoveUnusedNodesPass()(model)
    for value in [value for value in model.graph.inputs if value.name in _replaced_inputs(signature)]:
        model.graph.inputs.remove(value)
    model.graph.inputs.extend(caches.values())
