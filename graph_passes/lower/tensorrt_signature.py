"""What TensorRT wants of a graph's border: caches of a static capacity, and weights as inputs if asked for."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.infra import FusionPass

_WEIGHT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class StaticCapacity(FusionPass):
    """Give every cache the capacity ``capacity``: TensorRT's cache layer refuses a dynamic one."""

    name: ClassVar[str] = "static_capacity"

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def run(self, model: ir.Model) -> None:
        for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
            if value.shape is None or not any(_names_capacity(dim) for dim in value.shape):
                continue
            value.shape = ir.Shape([self.capacity if _names_capacity(dim) else dim for dim in value.shape])
            self.matches += 1


def _names_capacity(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value == names.CAPACITY


def split_weight_inputs(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Turn every weight matrix of ``model`` into a graph input, in place; returns the tensors to bind to them.

    A weight matrix is a floating-point initializer of two or more dimensions; norms, biases and rotary tables stay
    constants, which cost kilobytes and let TensorRT fold them.
    """
    taken: dict[str, ir.TensorProtocol] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or len(tensor.shape) < 2 or tensor.dtype not in _WEIGHT_TYPES or name.startswith("rope."):
            continue
        taken[name] = tensor
        del model.graph.initializers[name]
        value.const_value = None
        model.graph.inputs.append(value)
    return taken
