"""Fold layout changes of weights into the weights' plan: no data is read.

``Transpose(weight)`` and its like become initializers whose bytes are made when the model is saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import ClassVar

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.graph_passes.infra import (
    FusionPass,
    add_initializer,
    int_attribute,
    integers,
    ints_attribute,
    weight,
)


class FoldWeightTransforms(FusionPass):
    """Replace Transpose, Reshape, Squeeze, Unsqueeze, Cast, Concat, Slice and Split of weights by derived weights."""

    name: ClassVar[str] = "fold_weight_transforms"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            fold = _FOLDS.get(node.op_type) if not node.domain else None
            if fold is None or not _all_weights(node):
                continue
            tensors = fold(node)
            if tensors is None:
                self.fail(f"{node.op_type} of a weight that no plan of weights describes", node)
                continue
            source = node.inputs[0]
            assert source is not None
            for output, tensor in zip(node.outputs, tensors, strict=True):
                value = add_initializer(model, f"{source.name}.{_SUFFIX[node.op_type]}", tensor)
                output.replace_all_uses_with(value)
            self.matches += 1


def _all_weights(node: ir.Node) -> bool:
    """Whether the node's data inputs are floating-point initializers of at least one dimension that no caller sets."""
    data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return not any(output.is_graph_output() for output in node.outputs) and all(
        value is not None
        and value.is_initializer()
        and (tensor := weight(value)) is not None
        and tensor.dtype.is_floating_point()
        and len(tensor.shape) > 0
        for value in data
    )


def _tensor(node: ir.Node, index: int = 0) -> ir.TensorProtocol:
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    return value.const_value


def _dims(node: ir.Node) -> list[int]:
    return [int(dim) for dim in _tensor(node).shape]  # type: ignore[arg-type]


def _transpose(node: ir.Node) -> list[ir.TensorProtocol]:
    return [weights.transpose(_tensor(node), ints_attribute(node, "perm"))]


def _reshape(node: ir.Node) -> list[ir.TensorProtocol] | None:
    wanted = integers(node.inputs[1])
    if wanted is None:
        return None
    shape = _dims(node)
    copies = not int_attribute(node, "allowzero", 0)
    copied = [shape[axis] if dim == 0 and copies else dim for axis, dim in enumerate(wanted)]
    if -1 in copied:
        known, total = 1, 1
        for dim in copied:
            known *= dim if dim != -1 else 1
        for dim in shape:
            total *= dim
        copied[copied.index(-1)] = total // known
    return [weights.reshape(_tensor(node), copied)]


def _unsqueeze(node: ir.Node) -> list[ir.TensorProtocol] | None:
    axes = integers(node.inputs[1])
    if axes is None:
        return None
    shape = _dims(node)
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return [weights.reshape(_tensor(node), shape)]


def _squeeze(node: ir.Node) -> list[ir.TensorProtocol] | None:
    shape = _dims(node)
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else [a for a, dim in enumerate(shape) if dim == 1]
    if axes is None:
        return None
    dropped = {axis % len(shape) for axis in axes}
    return [weights.reshape(_tensor(node), [dim for axis, dim in enumerate(shape) if axis not in dropped])]


def _cast(node: ir.Node) -> list[ir.TensorProtocol] | None:
    to = ir.DataType(node.attributes["to"].as_int())
    return [weights.cast(_tensor(node), to)] if to.is_floating_point() else None


def _concat(node: ir.Node) -> list[ir.TensorProtocol]:
    axis = node.attributes["axis"].as_int() % len(_dims(node))
    return [weights.concat([_tensor(node, index) for index in range(len(node.inputs))], axis)]


def _slice(node: ir.Node) -> list[ir.TensorProtocol] | None:
    shape = _dims(node)
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    if starts is None or ends is None:
        return None
    axes, steps = list(range(len(starts))), [1] * len(starts)
    given = [*node.inputs[3:], None, None]
    read_axes, read_steps = (integers(value) if value is not None else None for value in given[:2])
    if (given[0] is not None and read_axes is None) or (given[1] is not None and read_steps is None):
        return None
    axes, steps = read_axes or axes, read_steps or steps
    if any(step != 1 for step in steps):
        return None
    tensor = _tensor(node)
    for start, end, axis in zip(starts, ends, axes, strict=True):
        axis %= len(shape)
        size = shape[axis]
        low, high = (max(0, min(size, bound + size if bound < 0 else bound)) for bound in (start, end))
        tensor = weights.slice_(tensor, axis, low, high)
    return [tensor]


def _split(node: ir.Node) -> list[ir.TensorProtocol] | None:
    shape = _dims(node)
    axis = int_attribute(node, "axis", 0) % len(shape)
    sizes = integers(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if sizes is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            return None
        each = -(-shape[axis] // len(node.outputs))
        sizes = [min(each, shape[axis] - index * each) for index in range(len(node.outputs))]
    bounds = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    return [weights.slice_(_tensor(node), axis, low, high) for low, high in itertools.pairwise(bounds)]


_FOLDS: dict[str, Callable[[ir.Node], list[ir.TensorProtocol] | None]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Cast": _cast,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
}
_SUFFIX = {
    "Transpose": "transposed",
    "Reshape": "reshaped",
    "Unsqueeze": "reshaped",
    "Squeeze": "reshaped",
    "Cast": "cast",
    "Concat": "joined",
    "Slice": "part",
    "Split": "part",
}
