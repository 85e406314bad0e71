"""Operators newer than a TensorRT parser, in terms of older ones."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.graph_passes.infra import FusionPass, constant, float_attribute, int_attribute, rank, replace_node, tag

OLD_OPSET = 20
"""The newest opset that TensorRT 10.3's parser knows."""
_BLOCKED_OPSET = 21
"""Of blocked 4-bit numbers, which the parser takes since TensorRT 10.0 (its changelog); no other operator of the graph
means something else in it."""
_OLD_IR_VERSION = 10
_NEWER_THAN_OLD_OPSET = frozenset({"Attention", "RMSNormalization", "RotaryEmbedding", "Swish", "TensorScatter"})


class ExpandSwish(FusionPass):
    """``Swish(x)`` -> ``x * Sigmoid(x)``, which every TensorRT fuses."""

    name: ClassVar[str] = "expand_swish"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.op_type != "Swish" or node.domain:
                continue
            if float_attribute(node, "alpha", 1.0) != 1.0:
                self.fail("its alpha is not 1", node)
                continue
            (x,) = node.inputs
            sigmoid = ir.node("Sigmoid", [x], name=f"{node.name}.sigmoid")
            product = ir.node("Mul", [x, sigmoid.outputs[0]], name=node.name)
            _describe(sigmoid, node.outputs[0])
            replace_node(model, node, [tag(each, self.name) for each in (sigmoid, product)], product.outputs)
            self.matches += 1


class ExpandRMSNorm(FusionPass):
    """``RMSNormalization`` over the last axis -> plain operators, computed in fp32 as the operator is."""

    name: ClassVar[str] = "expand_rms_norm"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.op_type != "RMSNormalization" or node.domain:
                continue
            x = node.inputs[0]
            dimensions = rank(x)
            axis = int_attribute(node, "axis", -1)
            if x is None or dimensions is None or axis not in (-1, dimensions - 1) or x.dtype is None:
                self.fail("it does not normalize the last axis alone", node)
                continue
            epsilon = float_attribute(node, "epsilon", 1e-5)
            steps = self._steps(model, node, x, x.dtype, epsilon)
            replace_node(model, node, steps, [steps[-1].outputs[0]])
            self.matches += 1

    def _steps(self, model: ir.Model, node: ir.Node, x: ir.Value, kind: ir.DataType, epsilon: float) -> list[ir.Node]:
        """x / sqrt(mean(x^2) + epsilon) * scale, the last of the nodes giving the result."""
        wide = ir.DataType.FLOAT
        steps: list[ir.Node] = []

        def add(op: str, inputs: list[ir.Value | None], role: str, **attributes: int) -> ir.Value:
            steps.append(ir.node(op, inputs, attributes, name=f"{node.name}.{role}"))
            return steps[-1].outputs[0]

        widened = x if kind == wide else add("Cast", [x], "widened", to=wide.value)
        square = add("Mul", [widened, widened], "square")
        mean = add("ReduceMean", [square, constant(model, "rms_norm.axes", [-1])], "mean", keepdims=1)
        smallest = constant(model, f"rms_norm.epsilon.{epsilon:g}", np.array(epsilon, np.float32))
        shifted = add("Add", [mean, smallest], "shifted")
        normalized = add("Div", [widened, add("Sqrt", [shifted], "rms")], "normalized")
        narrowed = normalized if kind == wide else add("Cast", [normalized], "narrowed", to=kind.value)
        result = add("Mul", [narrowed, node.inputs[1]], "scaled")
        for step in steps:
            output = tag(step, self.name).outputs[0]
            output.name = f"{step.name}.output"
            output.type = ir.TensorType(kind if output in (narrowed, result) else wide)
            if x.shape is not None:
                reduced = output is mean or step.op_type in ("Add", "Sqrt")
                output.shape = ir.Shape([*x.shape[:-1], 1]) if reduced else x.shape
        return steps


class LowerOpset(FusionPass):
    """Declare opset 20, whose operators mean the same in opset 24 for every one that is left in the graph.

    INT4 weights are of opset 21, which is declared where there are some.
    """

    name: ClassVar[str] = "opset_20"

    def run(self, model: ir.Model) -> None:
        left = [node for node in model.graph if not node.domain and node.op_type in _NEWER_THAN_OLD_OPSET]
        if left:
            raise GraphError(
                f"{left[0].op_type} (node {left[0].name}) is newer than opset {OLD_OPSET} and was not lowered."
            )
        blocked = any(node.op_type == "DequantizeLinear" and "block_size" in node.attributes for node in model.graph)
        model.graph.opset_imports[""] = _BLOCKED_OPSET if blocked else OLD_OPSET
        model.ir_version = _OLD_IR_VERSION
        self.matches += 1


def _describe(node: ir.Node, like: ir.Value) -> None:
    """Name the output of ``node`` after it, with the shape and type of ``like``."""
    node.outputs[0].name = f"{node.name}.output"
    node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
