"""The residual addition and norm in front of one of our ops -> its prologue."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.infra import FusionPass, int_attribute, is_op, single_consumer, static_dim, weight
from qwenforge.graph_passes.lower.cpu_ops import EPSILON, MICROSOFT, PROLOGUES, epsilon_of

_BIAS = 3
_SUM = 3


class NormAsPrologue(FusionPass):
    """Let an op compute the norm that only it reads, and the sum in front of that norm."""

    name: ClassVar[str] = "cpu_norms"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.domain != names.CPU_DOMAIN or node.op_type not in PROLOGUES:
                continue
            values = node.inputs[0]
            if values is None or single_consumer(values) is not node:
                continue
            skip = is_op(values, "SkipSimplifiedLayerNormalization", MICROSOFT)
            norm = is_op(values, "RMSNormalization")
            if skip is not None:
                if len(skip.inputs) > _BIAS and skip.inputs[_BIAS] is not None:
                    self.fail("its sum has a bias too", skip)
                elif not _is_vector(skip.inputs[2], values) or not _have_equal_shapes(skip):
                    self.fail("its operands are not of one shape, or its weight is not one constant a column", skip)
                else:
                    self._take(model, node, skip, residual=skip.inputs[1], scale=skip.inputs[2])
            elif norm is not None:
                if not _is_vector(norm.inputs[1], values) or not _is_of_rows(norm, values):
                    self.fail("it is not a norm of rows by one constant a column", norm)
                else:
                    self._take(model, node, norm, residual=None, scale=norm.inputs[1])

    def _take(
        self, model: ir.Model, node: ir.Node, norm: ir.Node, *, residual: ir.Value | None, scale: ir.Value | None
    ) -> None:
        place = PROLOGUES[node.op_type]
        node.resize_inputs(place + 2)
        node.replace_input_with(0, norm.inputs[0])
        node.replace_input_with(place, residual)
        node.replace_input_with(place + 1, scale)
        node.attributes[EPSILON] = ir.AttrFloat32(EPSILON, epsilon_of(norm))
        total = norm.outputs[_SUM] if residual is not None and len(norm.outputs) > _SUM else None
        if total is not None and (total.uses() or total.is_graph_output()):
            node.resize_outputs(2)
            new = node.outputs[1]
            new.shape, new.type = total.shape, total.type
            new.name, total.name = total.name, None
            total.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove(norm, safe=True)
        self.matches += 1


def _is_vector(scale: ir.Value | None, values: ir.Value) -> bool:
    """Whether the kernels may read the norm's weight when they are made: one constant for each column."""
    return (
        scale is not None
        and weight(scale) is not None
        and scale.shape is not None
        and len(scale.shape) == 1
        and static_dim(scale, 0) == static_dim(values, -1)
    )


def _is_of_rows(norm: ir.Node, values: ir.Value) -> bool:
    axis = int_attribute(norm, "axis", -1)
    return axis == -1 or (values.shape is not None and axis == len(values.shape) - 1)


def _have_equal_shapes(skip: ir.Node) -> bool:
    """ONNX Runtime's would repeat a residual of fewer rows."""
    first, second = skip.inputs[:2]
    return first is not None and second is not None and first.shape is not None and first.shape == second.shape
