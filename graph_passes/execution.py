"""Run an onnx_ir model in ONNX Runtime on the CPU, to compare what graphs compute.

Graph optimizations are off: they would hide a difference, or add one, that is not the rewrite's. Weights reach the
session as they lie in memory (or in a memory-mapped file) without a copy, so that no size limit of protobuf applies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.exporter.transforms import Cast
from qwenforge.exporter.weights import DerivedTensor
from qwenforge.graph_passes.lower.reference_bodies import expand_target_nodes

Array = npt.NDArray[Any]

_INLINE_BYTES = 1 << 16
_SHAREABLE = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT8, ir.DataType.UINT8}
    | {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL}
)
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "softmax_precision", "stash_type"})
_HALF_TYPES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def half_types(model: ir.Model) -> set[ir.DataType]:
    """The 16-bit floating types among the model's inputs, initializers and values."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in model.graph.all_nodes() for value in node.outputs]
    return {value.dtype for value in values if value.dtype in _HALF_TYPES}


class Executable:
    """A model loaded in ONNX Runtime.

    Args:
        model: the model; it is not changed. Nodes of TensorRT and of our plugins run from their reference bodies.
        upcast: compute in fp32 what the graph computes in fp16 or bf16. bf16 has no CPU kernels in ONNX Runtime, so
            that only the upcast graph can be run: it shows that two graphs are the same function, not how they round.

    Raises:
        GraphError: ONNX Runtime refuses the model.
    """

    def __init__(self, model: ir.Model, *, upcast: bool = False) -> None:
        import onnxruntime

        copy = model.clone()
        expand_target_nodes(copy)
        if upcast:
            upcast_to_float32(copy)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        # Products of dequantized weights in fp32: by default ONNX Runtime rounds their activations to INT8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # The session reads the weights where they are: they live as long as it does.
        self._weights = _share_weights(copy, options)
        try:
            serialized = ir.to_proto(copy).SerializeToString()
            self._session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        except _ort_errors() as error:
            raise GraphError(f"ONNX Runtime cannot load the graph: {_first_line(error)}") from error
        self._inputs = {value.name: value.dtype for value in copy.graph.inputs}

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs; floating feeds are cast to the type of their input.

        Raises:
            GraphError: ONNX Runtime stops with an error.
        """
        typed = {name: self._typed(name, array) for name, array in feeds.items()}
        try:
            return list(self._session.run(list(outputs), typed))
        except _ort_errors() as error:
            raise GraphError(f"ONNX Runtime stops while running the graph: {_first_line(error)}") from error

    def _typed(self, name: str, array: Array) -> Array:
        dtype = self._inputs[name]
        return array if dtype is None else array.astype(dtype.numpy(), copy=False)


def _ort_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NotImplemented,
        state.RuntimeException,
        state.InvalidProtobuf,
        state.EPFail,
        ValueError,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _share_weights(model: ir.Model, options: Any) -> list[Any]:
    """Replace large initializers of ``model`` by references to memory that ``options`` hands to the session."""
    import onnxruntime

    names: list[str] = []
    shared: list[Any] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes < _INLINE_BYTES or tensor.dtype not in _SHAREABLE:
            if isinstance(tensor, ir.ExternalTensor):  # a session made from bytes finds no file beside itself
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
            continue
        array = np.ascontiguousarray(tensor.numpy())
        names.append(name)
        shared.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
        value.const_value = ir.ExternalTensor(
            "in-memory", 0, array.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name, base_dir=""
        )
    if names:
        options.add_external_initializers(names, shared)
    return shared


def upcast_to_float32(model: ir.Model, *, cast_weights_in_graph: bool = False) -> None:
    """Turn every fp16 and bf16 value, constant and cast of ``model`` into fp32, in place.

    Args:
        model: the model.
        cast_weights_in_graph: leave the initializers as they are, where they are, and let Cast nodes read them.
    """
    if cast_weights_in_graph:
        _cast_initializers(model.graph)
    else:
        for value in model.graph.initializers.values():
            _retype(value)
    for value in model.graph.inputs:
        _retype(value)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            for output in node.outputs:
                _retype(output)
            for name, attribute in list(node.attributes.items()):
                node.attributes[name] = _upcast_attribute(attribute)


def widen_float8_caches(model: ir.Model) -> None:
    """Let the caches of E4M3 that ``model`` takes and gives be fp16 numbers of the same values, which NumPy can hold.

    The casts stand beside the attention, so that a piece of the model has its own.
    """
    graph = model.graph
    for value in graph.inputs:
        if value.dtype != ir.DataType.FLOAT8E4M3FN:
            continue
        value.type = ir.TensorType(ir.DataType.FLOAT16)
        for user, index in tuple(value.uses()):
            codes = _cast_for(user, value, ir.DataType.FLOAT8E4M3FN, f"{value.name}.float8")
            graph.insert_before(user, codes)
            user.replace_input_with(index, codes.outputs[0])
    for index, value in enumerate(graph.outputs):
        producer = value.producer()
        if value.dtype != ir.DataType.FLOAT8E4M3FN or producer is None:
            continue
        name, value.name = value.name, f"{value.name}.float8"
        numbers = _cast_for(producer, value, ir.DataType.FLOAT16, str(name))
        graph.insert_after(producer, numbers)
        graph.outputs[index] = numbers.outputs[0]


def _cast_for(node: ir.Node, value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    """A new Cast of ``value`` to a value ``name``, named after ``node`` and so of the same layer."""
    cast = ir.node("Cast", [value], {"to": to}, name=f"{node.name}.{name}.cast")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, value.shape, ir.TensorType(to)
    return cast


def _cast_initializers(graph: ir.Graph) -> None:
    casts = []
    for value in graph.initializers.values():
        if value.dtype in _HALF_TYPES:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}.float32")
            cast.outputs[0].name, cast.outputs[0].shape = f"{value.name}.float32", value.shape
            cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            for user, index in tuple(value.uses()):
                if user is not cast:
                    user.replace_input_with(index, cast.outputs[0])
            casts.append(cast)
    first = next(iter(graph), None)
    if first is not None:
        graph.insert_before(first, casts)


def _retype(value: ir.Value) -> None:
    if value.dtype in _HALF_TYPES:
        value.type = ir.TensorType(ir.DataType.FLOAT)  # a new object: a clone shares its types with the original
    if value.const_value is not None and value.const_value.dtype in _HALF_TYPES:
        value.const_value = _upcast_tensor(value.const_value)


def _upcast_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if isinstance(tensor, DerivedTensor) and isinstance(tensor.transform, Cast):
        (source,) = tensor.sources
        if source.dtype == ir.DataType.FLOAT:
            return source  # a folded cast to 16 bits goes like a Cast node does
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32)),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def _upcast_attribute(attribute: ir.Attr) -> ir.Attr:
    if attribute.is_ref():
        return attribute
    if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _HALF_TYPES:
        return ir.AttrTensor(attribute.name, _upcast_tensor(attribute.value))
    names_type = attribute.name in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT
    if names_type and attribute.value in (int(dtype) for dtype in _HALF_TYPES):
        return ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    return attribute
