"""The operators that the ONNX standard lacks, as functions with bodies in standard operators (opset 24).

The portable form calls them; a runtime without kernels of its own runs the bodies, and every lowering is compared with
them. Their meaning:

``GroupedQueryAttention`` (q [B, S, Hq*D], k, v [B, S, Hk*D], past_key, past_value [B, Hk, M, D], cos, sin [P, D/2],
position_ids [B, S], cache_position [B]) -> (y [B, S, Hq*D], present_key, present_value), attributes num_heads,
num_key_value_heads, scale, sliding_window. Rotates q and k (half-split RoPE), writes k and v at cache_position and
attends causally: query j of row b stands at cache_position[b] + j and sees the keys up to itself, the last
sliding_window of them if that is not 0.

``MixtureOfExperts`` (x [T, C], router_logits [T, E], gate_up [E, 2I, C], down [E, C, I]) -> y [T, C], attributes
top_k, normalize_topk. Softmax over all experts in fp32, top_k of them, renormalized if asked, SwiGLU experts (rows
0..I-1 of gate_up are the gate), weighted sum. The body computes every expert and drops the unselected ones, which needs
[E, 2I, T] values instead of a copy of the selected weights for each token.

Each has a quantized form, with inputs behind the others'. Its rounding is in float32, to the nearest, half to even, and
saturating, whatever the dtype of the tokens:

``QuantizedGroupedQueryAttention``: caches of INT8 or FLOAT8E4M3FN, key_scales [Hk, D] and value_scales [Hk], float32.
What is appended is divided by its scale and rounded; every key and value that is read is a code times its scale.

``QuantizedMixtureOfExperts``: activation_scales [1 + E], float32. Tokens (but not for the router) are rounded to E4M3
numbers times the first scale, the activated channels of expert e to E4M3 numbers times scale 1 + e.
"""

from __future__ import annotations

import functools

import onnx_ir as ir

from qwenforge import names

VERSION = 1

GROUPED_QUERY_ATTENTION = "GroupedQueryAttention"
MIXTURE_OF_EXPERTS = "MixtureOfExperts"
QUANTIZED_ATTENTION = "QuantizedGroupedQueryAttention"
QUANTIZED_EXPERTS = "QuantizedMixtureOfExperts"

_MODEL = """
<ir_version: 11, opset_import: ["" : 24, "qwenforge" : 1]>
unused (float[1] x) => (float[1] y) { y = Identity (x) }
"""

_ATTENTION = """
<domain: "qwenforge", opset_import: ["" : 24]>
%(name)s <num_heads, num_key_value_heads, scale, sliding_window>
    (q, k, v, past_key, past_value, cos, sin, position_ids, cache_position%(inputs)s) => (y, present_key, present_value)
{
    minus_one = Constant <value_ints = [-1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_one = Constant <value_ints = [1]> ()
    keep = Constant <value_ints = [0, 0]> ()
    query_heads = Constant <value_int : int = @num_heads> ()
    key_heads = Constant <value_int : int = @num_key_value_heads> ()
    query_count = Reshape (query_heads, minus_one)
    key_count = Reshape (key_heads, minus_one)
    query_shape = Concat <axis = 0> (keep, query_count, minus_one)
    key_shape = Concat <axis = 0> (keep, key_count, minus_one)
    q_split = Reshape (q, query_shape)
    k_split = Reshape (k, key_shape)
    v_split = Reshape (v, key_shape)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k_split)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
    q_rotated = RotaryEmbedding (q_heads, cos, sin, position_ids)
    k_rotated = RotaryEmbedding (k_heads, cos, sin, position_ids)
    %(write)s
    %(all_keys)s = TensorScatter <axis = -2, mode = "linear"> (%(past_key)s, %(new_keys)s, cache_position)
    %(all_values)s = TensorScatter <axis = -2, mode = "linear"> (%(past_value)s, %(new_values)s, cache_position)
    %(read)s
    capacity_dim = Shape <start = 2, end = 3> (present_key)
    capacity = Squeeze (capacity_dim)
    length_dim = Shape <start = 1, end = 2> (q)
    length = Squeeze (length_dim)
    keys = Range (zero, capacity, one)
    steps = Range (zero, length, one)
    starts = Unsqueeze (cache_position, axis_one)
    query_positions = Add (starts, steps)
    query_axes = Constant <value_ints = [1, 3]> ()
    queries = Unsqueeze (query_positions, query_axes)
    past_or_self = LessOrEqual (keys, queries)
    window = Constant <value_int : int = @sliding_window> ()
    unlimited = Equal (window, zero)
    oldest = Sub (queries, window)
    recent = Greater (keys, oldest)
    near = Or (recent, unlimited)
    mask = And (past_or_self, near)
    attended = Attention <scale : float = @scale> (q_rotated, %(keys)s, %(values)s, mask)
    joined = Transpose <perm = [0, 2, 1, 3]> (attended)
    joined_shape = Constant <value_ints = [0, 0, -1]> ()
    y = Reshape (joined, joined_shape)
}
"""

_EXPERTS = """
<domain: "qwenforge", opset_import: ["" : 24]>
%(name)s <top_k, normalize_topk> (x, router_logits, gate_up, down%(inputs)s) => (y)
{
    minus_one = Constant <value_ints = [-1]> ()
    zero = Constant <value_int = 0> ()
    axis_zero = Constant <value_ints = [0]> ()
    axis_one = Constant <value_ints = [1]> ()
    logits = Cast <to = 1> (router_logits)
    probabilities = Softmax <axis = -1> (logits)
    count = Constant <value_int : int = @top_k> ()
    counts = Reshape (count, minus_one)
    top, chosen = TopK <axis = -1, largest = 1, sorted = 1> (probabilities, counts)
    total = ReduceSum <keepdims = 1> (top, minus_one)
    normalized = Div (top, total)
    flag = Constant <value_int : int = @normalize_topk> ()
    normalize = Cast <to = 9> (flag)
    weights = Where (normalize, normalized, top)
    no_weight = Sub (probabilities, probabilities)
    spread = ScatterElements <axis = 1> (no_weight, chosen, weights)
    spread_typed = CastLike (spread, x)
    weight_columns = Transpose <perm = [1, 0]> (spread_typed)
    expert_weights = Unsqueeze (weight_columns, axis_one)
    selected_nothing = CastLike (zero, x)
    is_selected = Greater (expert_weights, selected_nothing)
    %(round_tokens)s
    columns = Transpose <perm = [1, 0]> (%(tokens)s)
    projected = MatMul (gate_up, columns)
    gate, up = Split <axis = 1, num_outputs = 2> (projected)
    activated = Swish (gate)
    hidden = Mul (activated, up)
    %(round_hidden)s
    expert_outputs = MatMul (down, %(hidden)s)
    weighted = Mul (expert_outputs, expert_weights)
    kept = Where (is_selected, weighted, selected_nothing)
    summed = ReduceSum <keepdims = 0> (kept, axis_zero)
    y = Transpose <perm = [1, 0]> (summed)
}
"""

_KEPT_CACHE = {
    "name": GROUPED_QUERY_ATTENTION,
    "inputs": "",
    "write": "",
    "past_key": "past_key",
    "past_value": "past_value",
    "all_keys": "present_key",
    "all_values": "present_value",
    "new_keys": "k_rotated",
    "new_values": "v_heads",
    "read": "",
    "keys": "present_key",
    "values": "present_value",
}
# Codes are scattered as fp16, which holds them all: ONNX Runtime scatters no FP8 numbers.
_QUANTIZED_CACHE = {
    "name": QUANTIZED_ATTENTION,
    "inputs": ", key_scales, value_scales",
    "write": """
    key_axes = Constant <value_ints = [0, 2]> ()
    value_axes = Constant <value_ints = [0, 2, 3]> ()
    key_steps = Unsqueeze (key_scales, key_axes)
    value_steps = Unsqueeze (value_scales, value_axes)
    step = Constant <value_float = 1.0> ()
    code_zero = CastLike (zero, past_key)
    k_wide = Cast <to = 1> (k_rotated)
    v_wide = Cast <to = 1> (v_heads)
    k_scaled = Div (k_wide, key_steps)
    v_scaled = Div (v_wide, value_steps)
    key_codes = QuantizeLinear (k_scaled, step, code_zero)
    value_codes = QuantizeLinear (v_scaled, step, code_zero)
    new_keys = Cast <to = 10> (key_codes)
    new_values = Cast <to = 10> (value_codes)
    past_key_numbers = Cast <to = 10> (past_key)
    past_value_numbers = Cast <to = 10> (past_value)""",
    "past_key": "past_key_numbers",
    "past_value": "past_value_numbers",
    "all_keys": "key_numbers",
    "all_values": "value_numbers",
    "new_keys": "new_keys",
    "new_values": "new_values",
    "read": """
    present_key = CastLike (key_numbers, past_key)
    present_value = CastLike (value_numbers, past_value)
    keys_unscaled = Cast <to = 1> (key_numbers)
    values_unscaled = Cast <to = 1> (value_numbers)
    keys_wide = Mul (keys_unscaled, key_steps)
    values_wide = Mul (values_unscaled, value_steps)
    all_keys = CastLike (keys_wide, q)
    all_values = CastLike (values_wide, q)""",
    "keys": "all_keys",
    "values": "all_values",
}
KEPT_TOKENS = {
    "name": MIXTURE_OF_EXPERTS,
    "inputs": "",
    "round_tokens": "",
    "tokens": "x",
    "round_hidden": "",
    "hidden": "hidden",
}
FLOAT8_TOKENS = {
    "name": QUANTIZED_EXPERTS,
    "inputs": ", activation_scales",
    "round_tokens": """
    end = Shape (activation_scales)
    of_tokens = Slice (activation_scales, axis_zero, axis_one)
    token_step = Squeeze (of_tokens)
    expert_steps = Slice (activation_scales, axis_one, end)
    x_wide = Cast <to = 1> (x)
    token_codes = QuantizeLinear <output_dtype = 17> (x_wide, token_step)
    token_numbers = DequantizeLinear (token_codes, token_step)
    tokens = CastLike (token_numbers, x)""",
    "tokens": "tokens",
    "round_hidden": """
    hidden_wide = Cast <to = 1> (hidden)
    hidden_codes = QuantizeLinear <axis = 0, output_dtype = 17> (hidden_wide, expert_steps)
    hidden_numbers = DequantizeLinear <axis = 0> (hidden_codes, expert_steps)
    hidden_rounded = CastLike (hidden_numbers, x)""",
    "hidden": "hidden_rounded",
}


@functools.cache
def _parsed() -> ir.Model:
    import onnx.parser

    text = _MODEL + _ATTENTION % _KEPT_CACHE + _ATTENTION % _QUANTIZED_CACHE
    text += _EXPERTS % KEPT_TOKENS + _EXPERTS % FLOAT8_TOKENS
    return ir.from_proto(onnx.parser.parse_model(text))


def function(op_type: str) -> ir.Function:
    """A fresh copy of the function ``op_type`` of domain ``qwenforge``."""
    return _parsed().functions[(names.DOMAIN, op_type, "")].clone()


def register_function(model: ir.Model, op_type: str) -> None:
    """Make ``op_type`` callable in ``model``: its body and the domain's opset import, once."""
    model.graph.opset_imports[names.DOMAIN] = VERSION
    if (names.DOMAIN, op_type, "") not in model.functions:
        body = function(op_type)
        model.functions[body.identifier()] = body
