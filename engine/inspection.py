"""What an ONNX model is made of: operators, what is fused, parameters and bytes by kind, layer by layer.

Weights are never read: external data stays on disk, and only names, shapes and types are looked at.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qwenforge import names
from qwenforge.engine.layer_recognition import LayerMap, recognize_layers
from qwenforge.engine.weight_kinds import KINDS, weight_kind
from qwenforge.errors import GraphError
from qwenforge.exporter.external_data import load_model

_FUSED = {
    "attention": {"GroupQueryAttention", "GroupedQueryAttention", "MultiHeadAttention", "Attention", "TRT_Attention"}
    | {"QwenForgeAttention", "PagedAttention", "CachedAttention"},
    "mixture of experts": {"MixtureOfExperts", "MoE", "QMoE", "QwenForgeMoE", "QuantizedMixtureOfExperts"},
    "gated MLP": {"QuantizedGatedMlp"},
    "normalization": {"RMSNormalization", "SimplifiedLayerNormalization", "LayerNormalization"},
    "residual and normalization": {"SkipSimplifiedLayerNormalization", "SkipLayerNormalization"},
    "rotary embedding": {"RotaryEmbedding"},
    "cache update in place": {"TensorScatter", "TRT_KVCacheUpdate"},
    "activation": {"Swish", "QuickGelu", "FastGelu", "Gelu", "BiasGelu"},
    "matrix product": {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits"}
    | {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QuantizedLinear"},
}
"""Groups of a report, and the operators counted in each whatever their domain."""

_CODES: dict[str, dict[int, str]] = {
    "QuantizedLinear": {1: "bits"},
    "QuantizedGatedMlp": {1: "bits", 4: "bits", 7: "down_bits"},
    "QuantizedMixtureOfExperts": {2: "bits", 5: "down_bits"}
    | {8: "shared_bits", 11: "shared_bits", 14: "shared_down_bits"},
}
"""Places of packed codes among the inputs of our ops for CPUs, and the attribute with their bits; scales and zero
points follow each."""


@dataclass(frozen=True)
class OperatorCount:
    """How often an operator occurs; the standard's domain is shown as ``ai.onnx``."""

    domain: str
    operator: str
    count: int


@dataclass(frozen=True)
class WeightGroup:
    """The initializers of one kind and type; ``parameters`` are logical ones where weights are packed."""

    kind: str
    dtype: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class LayerSummary:
    """One decoder layer; weights shared between layers and constants are not counted in it."""

    index: int
    nodes: int
    attention: str
    feed_forward: str
    parameters: int
    bytes: int
    operators: dict[str, int]


@dataclass(frozen=True)
class TensorSummary:
    """A graph input or output; symbolic dimensions by name, unknown ones as ``?``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Inspection:
    """The report on one model. ``layers_from`` says what told the layers, None when none were recognized."""

    name: str
    ir_version: int
    producer: str
    opsets: dict[str, int]
    nodes: int
    nodes_outside_layers: int
    operators: tuple[OperatorCount, ...]
    functions: dict[str, int]
    fused: dict[str, int]
    not_fused: tuple[str, ...]
    weights: tuple[WeightGroup, ...]
    layers_from: str | None
    layers: tuple[LayerSummary, ...]
    inputs: tuple[TensorSummary, ...]
    outputs: tuple[TensorSummary, ...]

    @property
    def parameters(self) -> int:
        """All parameters; a tensor stored once counts once."""
        return sum(group.parameters for group in self.weights)

    @property
    def bytes(self) -> int:
        """Bytes of all initializers as stored."""
        return sum(group.bytes for group in self.weights)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**dataclasses.asdict(self), "parameters": self.parameters, "bytes": self.bytes}


@dataclass(frozen=True)
class _Weight:
    kind: str
    dtype: str
    parameters: int
    bytes: int
    layer: int | None


def read_model(path: Path) -> ir.Model:
    """Read an ONNX file, leaving its external data on disk; GraphError when it is none."""
    if not path.is_file():
        raise GraphError(f"{path} is not a file; give an ONNX model or a bundle folder")
    model = load_model(path)
    if not model.opset_imports and not list(model.graph):
        raise GraphError(f"{path} is not an ONNX model: it has no operators and no opset; export it again")
    return model


def inspect_model(model: ir.Model, name: str, layers: LayerMap | None = None) -> Inspection:
    """Report on ``model``, called ``name`` in the report; ``layers`` is recognized when not given."""
    layers = recognize_layers(model.graph) if layers is None else layers
    nodes = list(model.graph.all_nodes())
    operators = Counter((node.domain or "ai.onnx", node.op_type) for node in nodes)
    weights = list(_weights(model, layers))
    summaries = tuple(_layer(index, layers, weights) for index in layers.indices)
    return Inspection(
        name=name,
        ir_version=model.ir_version,
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        opsets={domain or "ai.onnx": version for domain, version in sorted(model.opset_imports.items())},
        nodes=len(nodes),
        nodes_outside_layers=len(nodes) - sum(layer.nodes for layer in summaries),
        operators=tuple(OperatorCount(*key, count) for key, count in sorted(operators.items(), key=_by_count)),
        functions={f"{key[0]}::{key[1]}": len(list(function)) for key, function in model.functions.items()},
        fused={group: sum(node.op_type in operators for node in nodes) for group, operators in _FUSED.items()},
        not_fused=tuple(_not_fused(model.graph, nodes)),
        weights=tuple(_group(weights)),
        layers_from=layers.source,
        layers=summaries,
        inputs=tuple(_tensor(value) for value in model.graph.inputs if not value.is_initializer()),
        outputs=tuple(_tensor(value) for value in model.graph.outputs),
    )


def is_mixture_of_experts(nodes: Iterable[ir.Node]) -> bool:
    """Whether a layer's nodes route tokens to experts, fused or not."""
    return any(node.op_type == "TopK" or node.op_type in _FUSED["mixture of experts"] for node in nodes)


def _by_count(item: tuple[tuple[str, str], int]) -> tuple[int, tuple[str, str]]:
    return -item[1], item[0]


def _not_fused(graph: ir.Graph, nodes: list[ir.Node]) -> Iterator[str]:
    """Sentences on what a fusion would have replaced."""
    counts = Counter(node.op_type for node in nodes)
    fused = {group: sum(counts[name] for name in operators) for group, operators in _FUSED.items()}
    if counts["Softmax"] and not fused["attention"]:
        yield "attention: Softmax, but no attention operator"
    if counts["ReduceMean"]:
        yield f"normalization: {counts['ReduceMean']} ReduceMean nodes"
    if counts["TopK"] and not fused["mixture of experts"]:
        yield "experts: TopK, but no mixture-of-experts operator"
    makers = [value.producer() for value in graph.outputs]
    if growing := sum(node is not None and node.op_type == "Concat" for node in makers):
        yield f"cache: {growing} outputs grow by Concat, copied for every token"


def _weights(model: ir.Model, layers: LayerMap) -> Iterator[_Weight]:
    seen: set[tuple[str, int, int]] = set()
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            if isinstance(tensor, ir.ExternalTensor):
                place = (str(tensor.location), tensor.offset or 0, tensor.nbytes)
                if place in seen:
                    continue
                seen.add(place)
            dtype, parameters = _type_and_parameters(value, tensor)
            users = {layers.of.get(node) for node, _ in value.uses()}
            kind = weight_kind(value)
            layer = users.pop() if len(users) == 1 and kind != KINDS[-1] else None
            yield _Weight(kind, dtype, parameters, tensor.nbytes, layer)


def _type_and_parameters(value: ir.Value, tensor: ir.TensorProtocol) -> tuple[str, int]:
    for node, position in value.uses():
        if node.op_type == "MatMulNBits" and position > 0:
            if position > 1:  # scales and zero points describe parameters, they are none
                return f"{_type_name(tensor.dtype)} (scales)", 0
            size = (node.attributes[name].as_int() for name in ("K", "N"))
            bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
            return f"int{bits} (packed)", math.prod(size)
        codes = _CODES.get(node.op_type, {}) if node.domain == names.CPU_DOMAIN else {}
        if position in codes:
            bits = node.attributes[codes[position]].as_int()
            return f"int{bits} (packed)", tensor.size * 8 // bits
        if position - 1 in codes or position - 2 in codes:
            return f"{_type_name(tensor.dtype)} (scales)", 0
    return _type_name(tensor.dtype), tensor.size


def _type_name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _group(weights: list[_Weight]) -> Iterator[WeightGroup]:
    groups: dict[tuple[str, str], list[_Weight]] = {}
    for weight in weights:
        groups.setdefault((weight.kind, weight.dtype), []).append(weight)
    for kind, dtype in sorted(groups, key=lambda key: (KINDS.index(key[0]), key[1])):
        members = groups[kind, dtype]
        parameters, size = sum(member.parameters for member in members), sum(member.bytes for member in members)
        yield WeightGroup(kind, dtype, len(members), parameters, size)


def _layer(index: int, layers: LayerMap, weights: list[_Weight]) -> LayerSummary:
    top = layers.nodes(index)
    nodes = [inner for node in top for inner in (node, *_nested(node))]
    own = [weight for weight in weights if weight.layer == index]
    experts = [node.op_type for node in nodes if node.op_type in _FUSED["mixture of experts"]]
    shared = " and shared expert" if any(weight.kind == "shared expert" for weight in own) else ""
    attention = [node.op_type for node in nodes if node.op_type in _FUSED["attention"]]
    if experts:
        feed_forward = ", ".join(dict.fromkeys(experts)) + shared
    else:
        feed_forward = f"experts, not fused{shared}" if is_mixture_of_experts(nodes) else "dense"
    operators = Counter(node.op_type for node in nodes)
    return LayerSummary(
        index=index,
        nodes=len(nodes),
        attention=", ".join(dict.fromkeys(attention)) or "not fused",
        feed_forward=feed_forward,
        parameters=sum(weight.parameters for weight in own),
        bytes=sum(weight.bytes for weight in own),
        operators=dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
    )


def _nested(node: ir.Node) -> Iterator[ir.Node]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from graph.all_nodes()


def _tensor(value: ir.Value) -> TensorSummary:
    dims = value.shape if value.shape is not None else ()
    shape = tuple(dim if isinstance(dim, int) else (dim.value or "?") for dim in dims)
    return TensorSummary(value.name or "", _type_name(value.dtype) if value.dtype is not None else "?", shape)
