"""The experts in gathered form (transformers' ``batched_mm``), matched node by node.

Every (token, expert) pair gets its own copy of the expert's matrices: GatherND by expert id, MatMul with the token as
a column, SwiGLU, GatherND, MatMul, times the combine weight, summed over K.
"""

from __future__ import annotations

import onnx_ir as ir

from qwenforge.graph_passes.infra import float_attribute, int_attribute, integers, is_op, other_operand, static_dim

Matched = tuple[ir.TensorProtocol, ir.TensorProtocol, str, str]


def match_gathered(
    x: ir.Value, weights: ir.Value, chosen: ir.Value, output: ir.Value, *, experts: int | None, top_k: int
) -> Matched | None:
    """(gate_up [E, 2I, C], down [E, C, I], their names) when the nodes are exactly the gathered form, else None."""
    product = _summed_product(output)
    if product is None:
        return None
    for expert_output, weight_column in (product.inputs, list(reversed(product.inputs))):
        scale = is_op(weight_column, "Unsqueeze")
        if scale is None or not _has_axis(scale, 1) or not _flattens(scale.inputs[0], weights):
            continue
        down = _expert_product(expert_output, chosen)
        if down is None:
            continue
        down_weight, hidden = down
        projected = _swiglu(hidden)
        gate_up = _expert_product(projected, chosen)
        if gate_up is None:
            continue
        gate_up_weight, repeated = gate_up
        if not _repeats(repeated, x, top_k):
            continue
        if static_dim(gate_up_weight, 0) != experts or not _shapes_fit(gate_up_weight, down_weight, static_dim(x, -1)):
            continue
        assert gate_up_weight.const_value is not None and down_weight.const_value is not None
        return gate_up_weight.const_value, down_weight.const_value, str(gate_up_weight.name), str(down_weight.name)
    return None


def _summed_product(output: ir.Value) -> ir.Node | None:
    """The product behind [Cast] ReduceSum [Cast] Reshape."""
    total = is_op(_uncast(output), "ReduceSum")
    reshape = is_op(_uncast(total.inputs[0]), "Reshape") if total is not None else None
    return is_op(reshape.inputs[0], "Mul") if reshape is not None else None


def _uncast(value: ir.Value | None) -> ir.Value | None:
    node = is_op(value, "Cast")
    return node.inputs[0] if node is not None else value


def _flattens(value: ir.Value | None, source: ir.Value) -> bool:
    node = is_op(value, "Reshape")
    target = integers(node.inputs[1]) if node is not None else None
    return node is not None and node.inputs[0] is source and target is not None and len(target) == 1


def _has_axis(node: ir.Node, last: int) -> bool:
    """Whether a Squeeze or Unsqueeze drops or adds the ``last`` axis."""
    return len(node.inputs) > 1 and integers(node.inputs[1]) in ([-1], [last])


def _expert_product(value: ir.Value | None, chosen: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """(weight [E, out, in], input) of Squeeze(MatMul(weights of the ids, Unsqueeze(input)))."""
    squeeze = is_op(value, "Squeeze")
    product = is_op(squeeze.inputs[0], "MatMul") if squeeze is not None else None
    if squeeze is None or product is None or not _has_axis(squeeze, 2):
        return None
    gather = product.inputs[0].producer() if product.inputs[0] is not None else None
    column = is_op(product.inputs[1], "Unsqueeze")
    if gather is None or column is None or not _gathers(gather, chosen):
        return None
    if not _has_axis(column, 2):
        return None
    weight, source = gather.inputs[0], column.inputs[0]
    if weight is None or source is None or weight.const_value is None or len(weight.const_value.shape) != 3:
        return None
    return weight, source


def _gathers(node: ir.Node, chosen: ir.Value) -> bool:
    """Whether ``node`` takes the matrix of each chosen expert: GatherND by [T*K, 1] ids or Gather by [T*K] ids."""
    if node.op_type == "Gather" and not node.domain:
        return int_attribute(node, "axis", 0) == 0 and _flattens(node.inputs[1], chosen)
    if node.op_type != "GatherND" or node.domain or int_attribute(node, "batch_dims", 0):
        return False
    ids = is_op(node.inputs[1], "Unsqueeze")
    return ids is not None and _has_axis(ids, 1) and _flattens(ids.inputs[0], chosen)


def _swiglu(value: ir.Value) -> ir.Value | None:
    """The tensor whose first half is the gate and whose second half the up projection of ``value``."""
    product = is_op(value, "Mul")
    if product is None:
        return None
    for activated, up in (product.inputs, list(reversed(product.inputs))):
        gate = _silu_input(activated)
        split = is_op(gate, "Split")
        if split is None or is_op(up, "Split") is not split or len(split.outputs) != 2:
            continue
        if split.outputs[0] is gate and split.outputs[1] is up and int_attribute(split, "axis", 0) in (-1, 1):
            return split.inputs[0]
    return None


def _silu_input(activated: ir.Value | None) -> ir.Value | None:
    swish = is_op(activated, "Swish")
    if swish is not None:
        return swish.inputs[0] if float_attribute(swish, "alpha", 1.0) == 1.0 else None
    silu = is_op(activated, "Mul")
    if silu is None:
        return None
    for operand in silu.inputs:
        sigmoid = is_op(operand, "Sigmoid")
        if sigmoid is not None and operand is not None and other_operand(silu, operand) is sigmoid.inputs[0]:
            return sigmoid.inputs[0]
    return None


def _repeats(value: ir.Value, x: ir.Value, top_k: int) -> bool:
    """Whether ``value`` is each row of x, K times in a row: Reshape(Expand(Unsqueeze(x, 1), [1, K, 1]))."""
    reshape = is_op(value, "Reshape")
    expand = is_op(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = is_op(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if expand is None or unsqueeze is None or unsqueeze.inputs[0] is not x or integers(unsqueeze.inputs[1]) != [1]:
        return False
    shape = integers(expand.inputs[1])
    if shape is None or len(shape) != 3 or integers(reshape.inputs[1] if reshape is not None else None) is None:
        return False
    kept = (shape[0], static_dim(x, 0)), (shape[2], static_dim(x, 1))
    return shape[1] == top_k and all(wanted in (1, size) for wanted, size in kept) and len(value.shape or ()) == 2


def _shapes_fit(gate_up: ir.Value, down: ir.Value, hidden: int | None) -> bool:
    outer, inner = static_dim(gate_up, 1), static_dim(down, 2)
    return (
        static_dim(gate_up, 0) == static_dim(down, 0)
        and static_dim(gate_up, 2) == hidden == static_dim(down, 1)
        and outer is not None
        and inner is not None
        and outer == 2 * inner
    )
