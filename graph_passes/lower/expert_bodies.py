"""What ``QwenForgeMoE`` means for every kind of weights, as functions in standard operators.

Written from plugins/moe/op.yaml and README.md, not from the lowering: packed columns are put back into their order here
by the layout's definition, codes become numbers. FP8 tokens and activated channels are rounded to E4M3 by the very
steps of the portable function.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwenforge.graph_passes.functions import FLOAT8_TOKENS, KEPT_TOKENS

DOMAIN = "qwenforge.reference"

_KINDS = ("", "Int8", "Int4", "Float8")
"""By ``weight_type``."""

_MOE = """
<domain: "qwenforge.reference", opset_import: ["" : 24, "qwenforge.reference" : 1]>
%(name)s <top_k, normalize_topk, group_size>
    (hidden_states, router_logits, gate_up_weights, down_weights%(inputs)s) => (output)
{
    routed = qwenforge.reference.Route <top_k : int = @top_k, normalize_topk : int = @normalize_topk> (router_logits)
    %(shared)s
    %(unpack)s
    output = qwenforge.reference.PackedExperts%(rounded)s (hidden_states, weights, %(matrices)s)
}
"""
_SHARED = """
    gate_logits = Cast <to = 1> (shared_gate_logits)
    gate = Sigmoid (gate_logits)
    all_dim = Shape <start = 0, end = 1> (gate_up_weights)
    routed_dim = Shape <start = 1, end = 2> (router_logits)
    shared_dim = Sub (all_dim, routed_dim)
    one = Constant <value_ints = [1]> ()
    spread = Concat <axis = 0> (one, shared_dim)
    shared = Expand (gate, spread)
    weights = Concat <axis = 1> (routed, shared)"""
_UNPACK = """
    gate_up_wide = qwenforge.reference.Unpack%(kind)s <group_size : int = @group_size> (gate_up_weights, gate_up_scales)
    down_wide = qwenforge.reference.Unpack%(kind)s <group_size : int = @group_size> (down_weights, down_scales)
    gate_up = CastLike (gate_up_wide, hidden_states)
    down = CastLike (down_wide, hidden_states)"""

_UNPACKED = """
<domain: "qwenforge.reference", opset_import: ["" : 24]>
Unpack%(kind)s <group_size> (packed, scales) => (matrices)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    full = Constant <value_int = 256> ()
    signed = Cast <to = 7> (packed)
    raised = Add (signed, full)
    negative = Less (signed, zero)
    bytes = Where (negative, raised, signed)
    %(numbers)s
    columns_dim = Shape <start = 2, end = 3> (numbers)
    columns = Squeeze (columns_dim)
    steps = Range (zero, columns, one)
    group = Constant <value_int : int = @group_size> ()
    groups = Div (steps, group)
    wide_scales = Cast <to = 1> (scales)
    by_row = Transpose <perm = [0, 2, 1]> (wide_scales)
    by_column = Gather <axis = 2> (by_row, groups)
    matrices = Mul (numbers, by_column)
}
"""
_ORDERED = """
    blocks_shape = Constant <value_ints = [0, 0, -1, %(block)d]> ()
    blocks = Reshape (%(values)s, blocks_shape)
    order = Constant <value_ints = %(order)s> ()
    ordered = Gather <axis = 3> (blocks, order)
    row_shape = Constant <value_ints = [0, 0, -1]> ()
    rows = Reshape (ordered, row_shape)
    shift = Constant <value_int = %(shift)d> ()
    codes = Sub (rows, shift)
    numbers = Cast <to = 1> (codes)"""
_NIBBLES = """
    sixteen = Constant <value_int = 16> ()
    low = Mod (bytes, sixteen)
    high = Div (bytes, sixteen)
    last = Constant <value_ints = [-1]> ()
    low_column = Unsqueeze (low, last)
    high_column = Unsqueeze (high, last)
    nibbles = Concat <axis = -1> (low_column, high_column)"""
# sign, exponent of bias 7, three bits of fraction; exponent 0 has no leading 1, and all ones are NaN.
_FLOAT8 = """
    half = Constant <value_int = 128> ()
    eight = Constant <value_int = 8> ()
    rest = Mod (bytes, half)
    exponent = Div (rest, eight)
    fraction = Mod (rest, eight)
    small = Equal (exponent, zero)
    leading = Where (small, zero, eight)
    at_least_one = Max (exponent, one)
    significand_whole = Add (fraction, leading)
    significand = Cast <to = 1> (significand_whole)
    exponent_number = Cast <to = 1> (at_least_one)
    bias = Constant <value_float = 10.0> ()
    power = Sub (exponent_number, bias)
    two = Constant <value_float = 2.0> ()
    scale = Pow (two, power)
    positive = Mul (significand, scale)
    minus = Neg (positive)
    is_minus = GreaterOrEqual (bytes, half)
    finite = Where (is_minus, minus, positive)
    most = Constant <value_int = 127> ()
    is_nan = Equal (rest, most)
    nothing = Sub (finite, finite)
    nan = Div (nothing, nothing)
    numbers = Where (is_nan, nan, finite)"""

_EXPERTS = """
<domain: "qwenforge.reference", opset_import: ["" : 24]>
PackedExperts%(name)s (x, weights, gate_up, down%(inputs)s) => (y)
{
    axis_zero = Constant <value_ints = [0]> ()
    axis_one = Constant <value_ints = [1]> ()
    %(round_tokens)s
    columns = Transpose <perm = [1, 0]> (%(tokens)s)
    projected = MatMul (gate_up, columns)
    count = Shape <start = 0, end = 1> (x)
    tile_head = Constant <value_ints = [0, -1, 16]> ()
    tile_shape = Concat <axis = 0> (tile_head, count)
    tiles = Reshape (projected, tile_shape)
    gate, up = Split <axis = 2, num_outputs = 2> (tiles)
    activated = Swish (gate)
    product = Mul (activated, up)
    row_head = Constant <value_ints = [0, -1]> ()
    row_shape = Concat <axis = 0> (row_head, count)
    hidden = Reshape (product, row_shape)
    %(round_hidden)s
    outputs = MatMul (down, %(hidden)s)
    typed = CastLike (weights, x)
    weight_rows = Transpose <perm = [1, 0]> (typed)
    factors = Unsqueeze (weight_rows, axis_one)
    weighted = Mul (outputs, factors)
    zero = Constant <value_float = 0.0> ()
    nothing = CastLike (zero, x)
    chosen = Greater (factors, nothing)
    kept = Where (chosen, weighted, nothing)
    summed = ReduceSum <keepdims = 0> (kept, axis_zero)
    y = Transpose <perm = [1, 0]> (summed)
}
"""
_AS_IT_IS = KEPT_TOKENS | {"name": ""}
_ROUNDED = FLOAT8_TOKENS | {"name": "Float8"}


def expert_function(shared: bool, weight_type: int) -> str:
    """The name of the function for a node with or without a shared expert and of ``weight_type``."""
    return "QwenForgeMoE" + "Shared" * shared + _KINDS[weight_type]


def called_by(weight_type: int) -> tuple[str, ...]:
    """The functions that it calls."""
    kind = _KINDS[weight_type]
    experts = "PackedExpertsFloat8" if kind == "Float8" else "PackedExperts"
    return ("Route", experts, *([f"Unpack{kind}"] if kind else []))


def expert_functions() -> str:
    """All of them, as text."""
    text = _EXPERTS % _AS_IT_IS + _EXPERTS % _ROUNDED
    # In each 16 columns, bytes 4 t .. 4 t + 3 are the columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
    of_bytes = [2 * t + column for t in range(4) for column in (0, 1, 8, 9)]
    # In each 32, bytes 4 t .. 4 t + 3 are a word whose nibbles p and p + 4 are a pair of columns: for p = 0 2 t and
    # 2 t + 1, for 1 2 t + 8 and 2 t + 9, for 2 and 3 the same 16 columns on.
    of_nibbles = [2 * t + (0, 8, 16, 24)[p % 4] + p // 4 for t in range(4) for p in range(8)]
    numbers = {
        "Int8": _ORDERED % {"block": 16, "values": "bytes", "order": _places(of_bytes), "shift": 128},
        "Int4": _NIBBLES + _ORDERED % {"block": 32, "values": "nibbles", "order": _places(of_nibbles), "shift": 8},
        "Float8": _FLOAT8,
    }
    for kind, steps in numbers.items():
        text += _UNPACKED % {"kind": kind, "numbers": steps}
    for weight_type, kind in enumerate(_KINDS):
        for shared in (False, True):
            inputs = ", shared_gate_logits" * shared + ", gate_up_scales, down_scales" * bool(kind)
            matrices = "gate_up, down" if kind else "gate_up_weights, down_weights"
            text += _MOE % {
                "name": expert_function(shared, weight_type),
                "inputs": inputs + ", activation_scales" * (kind == "Float8"),
                "shared": _SHARED if shared else "weights = Identity (routed)",
                "unpack": _UNPACK % {"kind": kind} if kind else "",
                "rounded": "Float8" if kind == "Float8" else "",
                "matrices": matrices + ", activation_scales" * (kind == "Float8"),
            }
    return text


def _places(columns: Sequence[int]) -> str:
    """Where each column stands, as the text of a list."""
    return str([columns.index(column) for column in range(len(columns))])
