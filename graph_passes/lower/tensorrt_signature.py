"""What TensorRT wants of a graph's border: caches of a static capacity, and weights as inputs if asked for."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import names, op_spec
from qwenforge.errors import GraphError
from qwenforge.graph_passes.infra import FusionPass

TENSORRT_MAX_LENGTH = 4096
"""Size of the caches, and so the longest context, unless asked otherwise: all of it is allocated from the start."""

_WEIGHT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8)


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


def check_precision(model: ir.Model) -> None:
    """Make sure that every layer computes in 16 bits, as TensorRT's attention, our plugins and their kernels do.

    The caches may be of 8 bits, which only a plugin takes.

    Raises:
        GraphError: a cache or a plugin's tensor is of another type; the message names it.
    """
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    caches = [value for value in model.graph.inputs if (value.name or "").startswith("past_key_values.")]
    plugins = [node for node in model.graph if node.domain == op_spec.NAMESPACE]
    for value in (*caches, *(node.outputs[0] for node in plugins)):
        if value in caches and value.dtype == ir.DataType.INT8:
            continue
        if value.dtype is not None and value.dtype not in halves:
            raise GraphError(
                f"{value.name} is {value.dtype.name.lower()}: attention on a GPU and the plugins compute in 16 bits; "
                "export the model in fp16 or bf16."
            )


def split_weight_inputs(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Turn every weight matrix of ``model`` into a graph input, in place; returns the tensors to bind to them.

    A weight matrix is an initializer of two or more dimensions, in floating point or packed for a plugin; norms, biases
    and rotary tables stay constants, which cost kilobytes and let TensorRT fold them, and so do codes and scales of
    quantized products, which TensorRT wants at build time.
    """
    taken: dict[str, ir.TensorProtocol] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or len(tensor.shape) < 2 or tensor.dtype not in _WEIGHT_TYPES or name.startswith("rope."):
            continue
        if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node, _ in value.uses()):
            continue
        taken[name] = tensor
        del model.graph.initializers[name]
        value.const_value = None
        model.graph.inputs.append(value)
    return taken
