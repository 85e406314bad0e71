"""Drop Reshapes that change nothing, skip those that another one undoes, and merge equal ones.

Modeling code flattens tokens wherever it is handy: once for the experts and, of what is flat already, once more for
their router.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge.graph_passes.infra import FusionPass, int_attribute, integers, is_op


class SimplifyReshapes(FusionPass):
    """``Reshape(Reshape(x, s), t)`` -> ``Reshape(x, t)``, ``Reshape(x, shape of x)`` -> ``x``; equal ones -> one."""

    name: ClassVar[str] = "reshapes"

    def run(self, model: ir.Model) -> None:
        first: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        for node in list(model.graph):
            target = _target(node)
            if target is None:
                continue
            if 0 not in target:
                _read_source(node)
            source, output = node.inputs[0], node.outputs[0]
            assert source is not None
            same = source if is_shaped(source, target) else first.setdefault((source, tuple(target)), output)
            if same is not output and output.is_graph_output():
                self.fail("a superfluous Reshape gives a graph output its name", node)
            elif same is not output:
                output.replace_all_uses_with(same)
        for node in reversed(list(model.graph)):
            output = node.outputs[0]
            if node.op_type == "Reshape" and not node.domain and not output.uses() and not output.is_graph_output():
                model.graph.remove(node, safe=True)
                self.matches += 1


def _read_source(node: ir.Node) -> None:
    """Take the input of the Reshape in front, if there is one: the elements and their order are the same."""
    while (before := is_op(node.inputs[0], "Reshape")) is not None:
        node.replace_input_with(0, before.inputs[0])


def _target(node: ir.Node) -> list[int] | None:
    """The constant shape that ``node`` gives its input when it is a Reshape whose zeros, if any, copy dimensions."""
    if node.op_type != "Reshape" or node.domain:
        return None
    target = integers(node.inputs[1])
    return None if target is not None and 0 in target and int_attribute(node, "allowzero", 0) else target


def is_shaped(value: ir.Value, target: list[int]) -> bool:
    """Whether ``value`` is known to have the shape that a Reshape to ``target`` would give it.

    A dimension that is not known may stand where ``target`` copies it (0) or lets it follow from the others (-1).
    """
    if value.shape is None or len(value.shape) != len(target):
        return False
    return all(wanted in (0, -1) or dim == wanted for dim, wanted in zip(value.shape, target, strict=True))
