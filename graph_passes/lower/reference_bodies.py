"""What the nodes of a target mean, as functions in standard operators, so that a lowered graph runs in ONNX Runtime.

TensorRT's own operators and our plugins have no kernels in ONNX Runtime. Before such a graph is run for verification,
each of these nodes is replaced by a call of a function of domain ``qwenforge.reference``, written from the operator's
definition (plugins/*/op.yaml; for TensorRT's operators the documentation of ``IAttention`` and ``IMoELayer``), not
from the lowering: a lowering that packs weights wrongly or anchors a mask at the wrong corner then gives other numbers.
"""

from __future__ import annotations

import functools
import itertools

import onnx_ir as ir

from qwenforge import names, op_spec
from qwenforge.errors import GraphError
from qwenforge.graph_passes.functions import GROUPED_QUERY_ATTENTION, QUANTIZED_ATTENTION, register_function
from qwenforge.graph_passes.infra import replace_node
from qwenforge.graph_passes.lower.expert_bodies import DOMAIN, called_by, expert_function, expert_functions
from qwenforge.tensorrt_choice import LAYOUT_VERSION

_ATTENTION = """
<domain: "qwenforge.reference", opset_import: ["" : 24]>
TRT_Attention_%s (query, key, value, kv_lengths) => (output)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    one_axis = Constant <value_ints = [1]> ()
    valid_row = Cast <to = 7> (kv_lengths)
    valid = Unsqueeze (valid_row, one_axis)
    capacity_dim = Shape <start = 2, end = 3> (key)
    capacity = Squeeze (capacity_dim)
    new_dim = Shape <start = 2, end = 3> (query)
    new = Squeeze (new_dim)
    keys = Range (zero, capacity, one)
    steps = Range (zero, new, one)
    first_steps = Mul (steps, zero)
    last_valid = Sub (valid, one)
    before_new = Sub (valid, new)
    last_seen = %s
    axes = Constant <value_ints = [1, 3]> ()
    last_seen_keys = Unsqueeze (last_seen, axes)
    mask = LessOrEqual (keys, last_seen_keys)
    output = Attention <scale = 1.0> (query, key, value, mask)
}
"""
_LAST_KEY_SEEN = {
    "none": "Add (last_valid, first_steps)",
    "upper_left": "Min (last_valid, steps)",
    "lower_right": "Add (before_new, steps)",
}
"""The last key that query ``steps`` of a row sees, by ``causal_kind`` of TensorRT's attention layer."""

_OUR_ATTENTION = """
<domain: "qwenforge.reference", opset_import: ["" : 24, "qwenforge" : 1]>
%s <num_heads, num_key_value_heads, head_size, scale, sliding_window, epsilon>
    (%s, past_key, past_value, cos, sin, position_ids, cache_position%s%s) => (output, present_key, present_value)
{
    positions = Cast <to = 7> (position_ids)
    starts = Cast <to = 7> (cache_position)
    %s
    %s
    %s
    output, %s = qwenforge.%s <
        num_heads : int = @num_heads, num_key_value_heads : int = @num_key_value_heads, scale : float = @scale,
        sliding_window : int = @sliding_window> (%s, %s, cos, sin, positions, starts%s)
    %s
}
"""
_READ_FLOAT8 = """
    key_codes = Cast <to = 17> (past_key)
    value_codes = Cast <to = 17> (past_value)"""
_WRITE_FLOAT8 = """
    present_key = CastLike (new_key_codes, past_key)
    present_value = CastLike (new_value_codes, past_value)"""
_CACHES = ("", "Float8", "Int8")
"""By ``cache_type``."""
_FLOAT8_CACHE = 1
_SPLIT_QKV = """
    one_element = Constant <value_ints = [-1]> ()
    query_heads = Constant <value_int : int = @num_heads> ()
    key_heads = Constant <value_int : int = @num_key_value_heads> ()
    width = Constant <value_int : int = @head_size> ()
    query_columns = Mul (query_heads, width)
    key_columns = Mul (key_heads, width)
    query_part = Reshape (query_columns, one_element)
    key_part = Reshape (key_columns, one_element)
    parts = Concat <axis = 0> (query_part, key_part, key_part)
    query, key, value = Split <axis = 2> (packed, parts)
"""
_NORM_HEADS = """
    size = Constant <value_int : int = @head_size> ()
    last = Constant <value_ints = [-1]> ()
    size_axis = Reshape (size, last)
    kept = Constant <value_ints = [0, 0, -1]> ()
    apart = Concat <axis = 0> (kept, size_axis)
    query_heads_apart = Reshape (query, apart)
    key_heads_apart = Reshape (key, apart)
    query_normed = RMSNormalization <axis = -1, epsilon : float = @epsilon> (query_heads_apart, query_norm)
    key_normed = RMSNormalization <axis = -1, epsilon : float = @epsilon> (key_heads_apart, key_norm)
    query_ready = Reshape (query_normed, kept)
    key_ready = Reshape (key_normed, kept)
"""

_FUNCTIONS = """
<ir_version: 11, opset_import: ["" : 24, "qwenforge.reference" : 1]>
unused (float[1] x) => (float[1] y) { y = Identity (x) }
<domain: "qwenforge.reference", opset_import: ["" : 24]>
Route <top_k, normalize_topk> (router_logits) => (weights)
{
    minus_one = Constant <value_ints = [-1]> ()
    logits = Cast <to = 1> (router_logits)
    probabilities = Softmax <axis = -1> (logits)
    count = Constant <value_int : int = @top_k> ()
    counts = Reshape (count, minus_one)
    top, chosen = TopK <axis = -1, largest = 1, sorted = 1> (probabilities, counts)
    total = ReduceSum <keepdims = 1> (top, minus_one)
    normalized = Div (top, total)
    flag = Constant <value_int : int = @normalize_topk> ()
    normalize = Cast <to = 9> (flag)
    kept = Where (normalize, normalized, top)
    nothing = Sub (probabilities, probabilities)
    weights = ScatterElements <axis = 1> (nothing, chosen, kept)
}
<domain: "qwenforge.reference", opset_import: ["" : 24]>
TRT_MoE (hidden_states, selected, scores, gate, up, down) => (output)
{
    axis_zero = Constant <value_ints = [0]> ()
    axis_two = Constant <value_ints = [2]> ()
    x = Squeeze (hidden_states, axis_zero)
    ids_narrow = Squeeze (selected, axis_zero)
    ids = Cast <to = 7> (ids_narrow)
    kept = Squeeze (scores, axis_zero)
    tokens = Shape <start = 0, end = 1> (x)
    experts = Shape <start = 0, end = 1> (gate)
    spread_shape = Concat <axis = 0> (tokens, experts)
    zero = Constant <value_float = 0.0> ()
    nothing_scalar = CastLike (zero, x)
    nothing = Expand (nothing_scalar, spread_shape)
    spread = ScatterElements <axis = 1> (nothing, ids, kept)
    rows = Transpose <perm = [1, 0]> (spread)
    factors = Unsqueeze (rows, axis_two)
    gated = MatMul (x, gate)
    activated = Swish (gated)
    raised = MatMul (x, up)
    hidden = Mul (activated, raised)
    outputs = MatMul (hidden, down)
    weighted = Mul (outputs, factors)
    chosen = Greater (factors, nothing_scalar)
    present = Where (chosen, weighted, nothing_scalar)
    summed = ReduceSum <keepdims = 0> (present, axis_zero)
    output = Unsqueeze (summed, axis_zero)
}
"""

_OPSET = 24
_SILU = 1  # TRT_MoE's activation_type


@functools.cache
def _parsed() -> ir.Model:
    import onnx.parser

    attention = "".join(_ATTENTION % (kind, last) for kind, last in _LAST_KEY_SEEN.items())
    ours = "".join(
        _our_attention(*kind) for kind in itertools.product((False, True), (False, True), range(len(_CACHES)))
    )
    return ir.from_proto(onnx.parser.parse_model(_FUNCTIONS + expert_functions() + attention + ours))


def _our_attention_name(packed: bool, normed: bool, cache_type: int) -> str:
    return "QwenForgeAttention" + "Packed" * packed + "Normed" * normed + _CACHES[cache_type]


def _our_attention(packed: bool, normed: bool, cache_type: int) -> str:
    """The function for ``QwenForgeAttention`` with packed QKV, norms of the heads, 8-bit caches, or without each."""
    scales = ", key_scales, value_scales" if cache_type else ""
    float8 = cache_type == _FLOAT8_CACHE
    return _OUR_ATTENTION % (
        _our_attention_name(packed, normed, cache_type),
        "packed" if packed else "query, key, value",
        ", query_norm, key_norm" if normed else "",
        scales,
        _SPLIT_QKV if packed else "",
        _NORM_HEADS if normed else "",
        _READ_FLOAT8 if float8 else "",
        "new_key_codes, new_value_codes" if float8 else "present_key, present_value",
        QUANTIZED_ATTENTION if cache_type else GROUPED_QUERY_ATTENTION,
        "query_ready, key_ready, value" if normed else "query, key, value",
        "key_codes, value_codes" if float8 else "past_key, past_value",
        scales,
        _WRITE_FLOAT8 if float8 else "",
    )


def expand_target_nodes(model: ir.Model) -> bool:
    """Replace every node of TensorRT and of our plugins in ``model`` by a call of its reference; True if there was one.

    The caches become of symbolic capacity again, so that a verification may choose its own. An FP8 cache, whose bytes
    the plugin takes as INT8, becomes one of 16-bit numbers with the same values, which NumPy and ONNX Runtime share.
    """
    found = False
    for node in list(model.graph):
        call = _call(node)
        if call is None:
            continue
        op, inputs, attributes, called = call
        reference = ir.node(op, inputs, attributes, domain=DOMAIN, num_outputs=len(node.outputs), name=node.name)
        reference.metadata_props.update(node.metadata_props)
        if _has_float8_cache(node):
            for value in (*inputs, *node.outputs):
                if value is not None and value.dtype == ir.DataType.INT8:
                    value.type = ir.TensorType(ir.DataType.FLOAT16)
        replace_node(model, node, [reference], reference.outputs)
        for name in (op, *called):
            if name in (GROUPED_QUERY_ATTENTION, QUANTIZED_ATTENTION):
                register_function(model, name)
            else:
                body = _parsed().functions[(DOMAIN, name, "")].clone()
                model.functions.setdefault(body.identifier(), body)
        found = True
    if found:
        model.graph.opset_imports[""] = _OPSET
        model.graph.opset_imports[DOMAIN] = 1
        model.ir_version = max(model.ir_version or 0, 11)
        _free_capacity(model)
    return found


def _has_float8_cache(node: ir.Node) -> bool:
    return node.op_type == op_spec.load("attention").name and node.attributes["cache_type"].as_int() == _FLOAT8_CACHE


def _call(node: ir.Node) -> tuple[str, list[ir.Value | None], dict[str, ir.Attr], tuple[str, ...]] | None:
    """The function that stands for ``node``, its inputs and attributes, and the functions that it calls."""
    inputs, attributes = list(node.inputs), dict(node.attributes)
    if node.domain == op_spec.NAMESPACE and node.op_type == op_spec.load("attention").name:
        spec = op_spec.load("attention")
        inputs, numbers = _present_inputs(node, spec)
        _require(node, numbers["page_size"] == 0)
        cache_type = int(numbers["cache_type"])
        op = _our_attention_name(numbers["packed_qkv"] == 1, numbers["qk_norm"] == 1, cache_type)
        heads = ("num_heads", "num_key_value_heads", "head_size", "scale", "sliding_window", "epsilon")
        called = QUANTIZED_ATTENTION if cache_type else GROUPED_QUERY_ATTENTION
        return op, list(inputs), _fields(attributes, *heads), (called,)
    if node.domain == op_spec.NAMESPACE and node.op_type == op_spec.load("moe").name:
        shared = attributes["num_shared_experts"].as_int() > 0
        inputs, numbers = _present_inputs(node, op_spec.load("moe"))
        _require(node, numbers["layout_version"] == LAYOUT_VERSION)
        _require(node, numbers["num_local_experts"] == numbers["num_experts"])
        weight_type = int(numbers["weight_type"])
        kept = _fields(attributes, "top_k", "normalize_topk", "group_size")
        return expert_function(shared, weight_type), inputs, kept, called_by(weight_type)
    if node.op_type == "TRT_Attention":
        kind = attributes["causal_kind"].as_string() if "causal_kind" in attributes else "none"
        _require(node, kind in _LAST_KEY_SEEN and all(value is None for value in inputs[3:5]))
        return f"{node.op_type}_{kind}", [*inputs[:3], inputs[5]], {}, ()
    if node.op_type == "TRT_MoE":
        _require(node, attributes["activation_type"].as_int() == _SILU)
        return node.op_type, inputs, {}, ()
    return None


def _present_inputs(node: ir.Node, spec: op_spec.OpSpec) -> tuple[list[ir.Value | None], dict[str, int | float]]:
    """The inputs of one of our nodes that its attributes ask for, in order, and its attributes as numbers.

    A node for TensorRT lists those inputs; in one for ONNX Runtime they stand at their places, with nothing between.
    """
    numbers: dict[str, int | float] = {}
    for attribute in spec.attributes:
        given = node.attributes.get(attribute.name)
        _require(node, given is not None)
        assert given is not None
        numbers[attribute.name] = given.as_int() if attribute.type == "int" else given.as_float()
    _require(node, spec.problem(numbers) is None)
    wanted = spec.input_names(numbers)
    inputs = list(node.inputs)
    if None in inputs or len(inputs) != len(wanted):
        places = [tensor.name for tensor in spec.inputs]
        _require(node, len(inputs) <= len(places))
        named = {name: value for name, value in zip(places, inputs, strict=False) if value is not None}
        _require(node, list(named) == wanted)
        inputs = list(named.values())
    return inputs, numbers


def _require(node: ir.Node, known: bool) -> None:
    if not known:
        raise GraphError(
            f"node {node.name} ({node.op_type}) has attributes or inputs that its reference does not model."
        )


def _fields(attributes: dict[str, ir.Attr], *wanted: str) -> dict[str, ir.Attr]:
    return {name: attributes[name] for name in wanted}


def _free_capacity(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name and value.name.startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:2], names.CAPACITY, *value.shape[3:]])
