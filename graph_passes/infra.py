"""What every fusion pass shares: its base class and small questions about values and nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes

RULE_TAG = "qwenforge.rule"
"""Metadata key on a node that a pass created: the pass's name."""

_SMALL = 4096
"""Constants above this many elements are weights: never read to compare them with a number."""


class FusionPass(onnx_ir.passes.InPlacePass):
    """An in-place pass with a stable name that counts what it fused and says why it left look-alikes alone.

    Attributes:
        name: the rule's name in reports and for ``--disable``.
        matches: rewrites applied by the last run.
        failures: one reason for each look-alike that the last run did not rewrite.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.matches = 0
        self.failures: list[str] = []

    def call(self, model: ir.Model) -> onnx_ir.passes.PassResult:
        self.matches, self.failures = 0, []
        self.run(model)
        return onnx_ir.passes.PassResult(model, modified=self.matches > 0)

    def run(self, model: ir.Model) -> None:
        """Rewrite ``model`` in place, updating ``matches`` and ``failures``."""
        raise NotImplementedError

    def fail(self, reason: str, node: ir.Node | None = None) -> None:
        """Record why a look-alike was left as it is."""
        where = f" (at node {node.name or node.outputs[0].name})" if node is not None else ""
        self.failures.append(f"{reason}{where}")


def apply_rules(model: ir.Model, rules: Iterable[object]) -> int:
    """Apply onnxscript rewrite rules until none matches; returns the number of rewrites."""
    from onnxscript.rewriter import RewriteRuleSet

    return int(RewriteRuleSet(list(rules)).apply_to_model(model))  # type: ignore[arg-type]


def constant_value(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The value's array when it is a small constant (an initializer or a Constant node), else None."""
    if value is None:
        return None
    tensor = weight(value)
    if tensor is None:
        node = value.producer()
        if node is None or node.op_type != "Constant" or node.domain:
            return None
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None:
            return None
    if tensor.size > _SMALL:
        return None
    return np.asarray(tensor.numpy())


def weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The value's tensor when it is a constant of any size; None for a default that a caller may replace."""
    return None if value is None or value.is_graph_input() else value.const_value


def set_weight(model: ir.Model, node: ir.Node, index: int, tensor: ir.TensorProtocol) -> None:
    """Make ``tensor`` the constant that ``node`` reads as input ``index``; other readers of the old one keep it."""
    value = node.inputs[index]
    assert value is not None and value.name is not None
    if len(value.uses()) == 1 and not value.is_graph_output():
        value.const_value = tensor
        value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    else:
        node.replace_input_with(index, add_initializer(model, value.name, tensor))


def scalar(value: ir.Value | None) -> float | None:
    """The value's number when it is a constant of one element, else None."""
    array = constant_value(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def is_constant(value: ir.Value | None, number: float, *, rtol: float = 1e-3) -> bool:
    """Whether the value is a one-element constant equal to ``number`` (within a half-precision rounding)."""
    found = scalar(value)
    return found is not None and bool(np.isclose(found, number, rtol=rtol, atol=0))


def integers(value: ir.Value | None) -> list[int] | None:
    """The value's integers when it is a small integer constant, else None."""
    array = constant_value(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return [int(number) for number in array.reshape(-1)]


def is_op(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that produces ``value`` when it is an ``op_type``, else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == domain else None


def consumers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read ``value``, each once."""
    return list(dict.fromkeys(node for node, _ in value.uses()))


def single_consumer(value: ir.Value) -> ir.Node | None:
    """The only node that reads ``value``; None when there are several, none, or it is a graph output."""
    found = consumers(value)
    return found[0] if len(found) == 1 and not value.is_graph_output() else None


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of a binary node that is not ``value``."""
    first, second = node.inputs[0], node.inputs[1]
    return second if first is value else first if second is value else None


def static_dim(value: ir.Value | None, axis: int) -> int | None:
    """A known dimension of ``value``, else None."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def rank(value: ir.Value | None) -> int | None:
    """The number of ``value``'s dimensions when known."""
    return len(value.shape) if value is not None and value.shape is not None else None


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of ``node``."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute of ``node``."""
    attribute = node.attributes.get(name)
    return attribute.as_float() if attribute is not None else default


def ints_attribute(node: ir.Node, name: str) -> list[int] | None:
    """An integer-list attribute of ``node``, None when absent."""
    attribute = node.attributes.get(name)
    return list(attribute.as_ints()) if attribute is not None else None


def add_initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register ``tensor`` under ``name`` (made unique with a number) and return its value."""
    unique, count = name, 0
    while unique in model.graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    value = ir.Value(
        name=unique, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def constant(model: ir.Model, name: str, array: npt.NDArray[np.generic] | Sequence[int]) -> ir.Value:
    """A small initializer, shared with an equal one of the same name."""
    data = np.asarray(array, dtype=np.int64) if not isinstance(array, np.ndarray) else array
    existing = model.graph.initializers.get(name)
    if existing is not None and existing.const_value is not None:
        held = existing.const_value.numpy()
        if held.dtype == data.dtype and np.array_equal(held, data):
            return existing
    return add_initializer(model, name, ir.tensor(data, name=name))


def tag(node: ir.Node, rule: str) -> ir.Node:
    """Mark ``node`` as made by ``rule``."""
    node.metadata_props[RULE_TAG] = rule
    return node


def replace_node(model: ir.Model, old: ir.Node, new_nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
    """Put ``new_nodes`` in the place of ``old``; ``outputs`` take over its outputs' names, shapes, types and users."""
    model.graph.insert_before(old, new_nodes)
    for before, after in zip(old.outputs, outputs, strict=True):
        after.shape, after.type = before.shape, before.type
        after.name, before.name = before.name, None
        before.replace_all_uses_with(after, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)


def layer_scope(value: ir.Value | None) -> str:
    """``model.layers.3.`` when the value's name tells its layer, else an empty string."""
    import re

    found = re.search(r"model\.layers\.\d+\.", (value.name or "") if value is not None else "")
    return found.group(0) if found else ""
