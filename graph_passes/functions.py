"""The two operators that the ONNX standard lacks, as functions with bodies in standard operators (opset 24).

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
"""

from __future__ import annotations

import functools

import onnx_ir as ir

from qwenforge import names

VERSION = 1

GROUPED_QUERY_ATTENTION = "GroupedQueryAttention"
MIXTURE_OF_EXPERTS = "MixtureOfExperts"

_FUNCTIONS = """
<ir_version: 11, opset_import: ["" : 24, "qwenforge" : 1]>
unused (float[1] x) => (float[1] y) { y = Identity (x) }
<domain: "qwenforge", opset_import: ["" : 24]>
GroupedQueryAttention <num_heads, num_key_value_heads, scale, sliding_window>
    (q, k, v, past_key, past_value, cos, sin, position_ids, cache_position) => (y, present_key, present_value)
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
    present_key = TensorScatter <axis = -2, mode = "linear"> (past_key, k_rotated, cache_position)
    present_value = TensorScatter <axis = -2, mode = "linear"> (past_value, v_heads, cache_position)
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
    attended = Attention <scale : float = @scale> (q_rotated, present_key, present_value, mask)
    joined = Transpose <perm = [0, 2, 1, 3]> (attended)
    joined_shape = Constant <value_ints = [0, 0, -1]> ()
    y = Reshape (joined, joined_shape)
}
<domain: "qwenforge", opset_import: ["" : 24]>
MixtureOfExperts <top_k, normalize_topk> (x, router_logits, gate_up, down) => (y)
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
    columns = Transpose <perm = [1, 0]> (x)
    projected = MatMul (gate_up, columns)
    gate, up = Split <axis = 1, num_outputs = 2> (projected)
    activated = Swish (gate)
    hidden = Mul (activated, up)
    expert_outputs = MatMul (down, hidden)
    weighted = Mul (expert_outputs, expert_weights)
    kept = Where (is_selected, weighted, selected_nothing)
    summed = ReduceSum <keepdims = 0> (kept, axis_zero)
    y = Transpose <perm = [1, 0]> (summed)
}
"""


@functools.cache
def _parsed() -> ir.Model:
    import onnx.parser

    return ir.from_proto(onnx.parser.parse_model(_FUNCTIONS))


def function(op_type: str) -> ir.Function:
    """A fresh copy of the function ``op_type`` of domain ``qwenforge``."""
    return _parsed().functions[(names.DOMAIN, op_type, "")].clone()


def register_function(model: ir.Model, op_type: str) -> None:
    """Make ``op_type`` callable in ``model``: its body and the domain's opset import, once."""
    model.graph.opset_imports[names.DOMAIN] = VERSION
    if (names.DOMAIN, op_type, "") not in model.functions:
        body = function(op_type)
        model.functions[body.identifier()] = body
