"""Graphs of one QwenForgeAttention node named ``layer 3``, and calls of it in ONNX Runtime with its caches in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import torch
import yaml
from onnx import TensorProto, helper

from qwenforge.op_spec import NAMESPACE, OpSpec, TypeChoice, evaluate
from support.attention_cases import CACHES, EPSILON, Call, Inputs, Results
from support.simt import ON_GPU
from support.source_tree import ROOT

SPEC = OpSpec.model_validate(yaml.safe_load((ROOT / "plugins" / "attention" / "op.yaml").read_text(encoding="utf-8")))
CACHE_NAMES = {"past_key": "present_key", "past_value": "present_value"}
"""Inputs, and the outputs that have to be the same memory."""
ELEMENTS = {
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float32: TensorProto.FLOAT,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
}
_ELEMENT_NAMES = {str(kind).removeprefix("torch."): element for kind, element in ELEMENTS.items()}
_DEVICE = "cuda" if ON_GPU else "cpu"
_NOTHING = torch.zeros(16, dtype=torch.uint8)


def attributes_of(call: Call) -> dict[str, int | float]:
    """As the node has them."""
    return {
        "num_heads": call.heads,
        "num_key_value_heads": call.kv_heads,
        "head_size": call.size,
        "scale": call.scale,
        "sliding_window": call.window,
        "cache_type": CACHES.index(call.cache),
        "page_size": call.page_size,
        "packed_qkv": int(call.packed),
        "qk_norm": int(call.norm),
        "epsilon": EPSILON,
    }


def tensors_of(call: Call, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The node's inputs by the names of op.yaml, those that the attributes ask for; copies on the kernels' device."""
    flat = {name: getattr(inputs, name).flatten(2) for name in ("query", "key", "value")}
    if call.packed:
        flat["query"] = torch.cat(list(flat.values()), dim=2)
    every = {
        **flat,
        "past_key": inputs.key_cache,
        "past_value": inputs.value_cache,
        "cos": inputs.cos,
        "sin": inputs.sin,
        "position_ids": inputs.positions,
        "cache_position": inputs.starts,
        "query_norm": inputs.query_norm,
        "key_norm": inputs.key_norm,
        "key_scales": inputs.key_scales,
        "value_scales": inputs.value_scales,
        "page_table": inputs.pages,
    }
    names = SPEC.input_names(attributes_of(call))
    return {name: every[name].to(_DEVICE, copy=True).contiguous() for name in names}


def attention_node(call: Call, given: list[str], *, in_their_places: bool) -> onnx.NodeProto:
    """The node with inputs ``given``, in ONNX Runtime's form (an empty name for one that is absent) or TensorRT's."""
    inputs = [tensor.name if tensor.name in given else "" for tensor in SPEC.inputs]
    while not inputs[-1]:
        inputs.pop()
    if not in_their_places:
        inputs = [name for name in inputs if name]
    outputs = [tensor.name for tensor in SPEC.outputs]
    return helper.make_node(SPEC.name, inputs, outputs, domain=NAMESPACE, name="layer 3", **attributes_of(call))


def attention_model(
    call: Call, dtype: str, *, static: Mapping[str, int] | None = None, in_their_places: bool = True
) -> onnx.ModelProto:
    """The node with everything that it takes and gives as inputs and outputs of the graph.

    Args:
        static: extents of sizes of op.yaml; the others are dimensions of that name.
        in_their_places: as :func:`attention_node` has it.
    """
    attributes = attributes_of(call)
    names = SPEC.input_names(attributes)

    def info(tensor: Any) -> onnx.ValueInfoProto:
        kind = tensor.type
        kind = kind.values[int(attributes[kind.attribute])] if isinstance(kind, TypeChoice) else kind
        shape = [_extent(dimension, attributes, static or {}) for dimension in tensor.shape]
        return helper.make_tensor_value_info(tensor.name, _ELEMENT_NAMES[dtype if kind == "T" else kind], shape)

    node = attention_node(call, names, in_their_places=in_their_places)
    inputs = [info(tensor) for tensor in SPEC.inputs if tensor.name in names]
    return model_of([node], inputs, [info(tensor) for tensor in SPEC.outputs])


def model_of(
    nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """A model of these nodes that knows our domain."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(NAMESPACE, int(SPEC.version))]
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run_in_place(session: Any, tensors: Mapping[str, torch.Tensor], output: torch.Tensor) -> None:
    """One call with each cache bound as input and as output, so that ``tensors`` has what was appended.

    Args:
        output: where the graph's ``output`` is written.
    """
    binding = session.io_binding()
    for name, tensor in tensors.items():
        bind(binding.bind_input, name, tensor)
        if name in CACHE_NAMES:
            bind(binding.bind_output, CACHE_NAMES[name], tensor)
    bind(binding.bind_output, "output", output)
    session.run_with_iobinding(binding)


def bind(to: Any, name: str, tensor: torch.Tensor) -> None:
    """``binding.bind_input`` or ``bind_output`` of a tensor's own memory."""
    place = tensor if tensor.numel() else _NOTHING.to(tensor.device)  # an address is needed even so
    to(name, tensor.device.type, 0, ELEMENTS[tensor.dtype], list(tensor.shape), place.data_ptr())


def results(session: Any, call: Call, inputs: Inputs) -> Results:
    """Output and caches of one call in place."""
    tensors = tensors_of(call, inputs)
    output = torch.full(inputs.query.flatten(2).shape, torch.nan, dtype=inputs.query.dtype, device=_DEVICE)
    run_in_place(session, tensors, output)
    return Results(output.cpu().view(inputs.query.shape), tensors["past_key"].cpu(), tensors["past_value"].cpu())


def _extent(dimension: str | int, attributes: Mapping[str, int | float], static: Mapping[str, int]) -> int | str:
    text = str(dimension)
    if text.isidentifier() and text not in attributes:
        return static.get(text, text)
    return int(evaluate(text, dict(attributes)))
