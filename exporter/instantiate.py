"""Copy the layers of a fused template to the full depth of the checkpoint.

The template holds one layer of each kind; in the portable form a layer reads the residual stream, its cache and values
that all layers share, and writes the residual stream and its cache. Each layer of the checkpoint becomes a copy of its
kind's template with the weight plan's leaves exchanged for its own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from qwenforge import names
from qwenforge.exporter.checkpoint import Checkpoint, CheckpointTensor, SealedWeight, checkpoint_names
from qwenforge.exporter.expected_tensors import EMBEDDING, OUTPUT_HEAD
from qwenforge.exporter.trace import TracedModel
from qwenforge.exporter.weights import substitute

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_CACHE = re.compile(r"^(past_key_values|present)\.(\d+)\.(key|value)$")


@dataclass(frozen=True)
class Template:
    """One traced layer inside the fused graph."""

    index: int
    nodes: list[ir.Node]
    hidden_in: ir.Value
    hidden_out: ir.Value


def instantiate(fused: ir.Model, traced: TracedModel, checkpoint: Checkpoint) -> ir.Model:
    """The portable model of full depth.

    Args:
        fused: ``traced.model`` after the portable passes.
        traced: says which template each layer copies.
        checkpoint: where the other layers' tensors are.

    Raises:
        RuntimeError: the result would not use every tensor of the checkpoint; a bug, never the checkpoint's fault.
    """
    templates = _split(fused, len(traced.representative))
    graph = fused.graph
    inside = {node for template in templates for node in template.nodes}
    first, last = templates[0].hidden_in, templates[-1].hidden_out
    ordered = list(graph)
    end = max(index for index, node in enumerate(ordered) if node in inside)
    head = [node for node in ordered[: end + 1] if node not in inside]
    tail = ordered[end + 1 :]
    copier = _Copier(fused, traced, checkpoint)
    nodes = [copier.shared_node(node) for node in head]
    hidden = copier.value(first)
    outputs: dict[str, ir.Value] = {}
    for layer, template_index in enumerate(traced.template_of_layer):
        template = templates[template_index]
        layer_nodes, hidden, present = copier.layer(template, layer, hidden)
        nodes += layer_nodes
        outputs |= present
    copier.bind(last, hidden)
    nodes += [copier.shared_node(node) for node in tail]
    outputs[names.LOGITS] = copier.value(next(value for value in graph.outputs if value.name == names.LOGITS))
    order = [names.LOGITS]
    for layer in range(len(traced.template_of_layer)):
        order += [names.present_key(layer), names.present_value(layer)]
    _require_all_tensors(copier.initializers, checkpoint)
    built = ir.Graph(
        copier.inputs,
        [outputs[name] for name in order],
        nodes=nodes,
        initializers=copier.initializers,
        opset_imports=dict(graph.opset_imports),
        name=graph.name,
    )
    return ir.Model(built, ir_version=fused.ir_version, functions=list(fused.functions.values()))


def _require_all_tensors(initializers: list[ir.Value], checkpoint: Checkpoint) -> None:
    """A weight lost on the way here would only show as wrong logits."""
    tensors = [value.const_value for value in initializers if value.const_value is not None]
    read = {name for tensor in tensors for name in checkpoint_names(tensor)}
    unread = set(checkpoint.names) - read
    if checkpoint.config.tie_word_embeddings:
        unread -= {EMBEDDING, OUTPUT_HEAD}
    if unread:
        raise RuntimeError(f"the exported graph does not use {min(unread)} of the checkpoint")


def _split(model: ir.Model, count: int) -> list[Template]:
    """Find each template's nodes between the residual stream's values."""
    boundaries = [_norm_input(model, f"model.layers.{index}.input_layernorm.weight") for index in range(count)]
    boundaries.append(_norm_input(model, "model.norm.weight"))
    presents = {value.name: value for value in model.graph.outputs}
    templates = []
    for index in range(count):
        hidden_in, hidden_out = boundaries[index], boundaries[index + 1]
        wanted = [hidden_out, presents[names.present_key(index)], presents[names.present_value(index)]]
        templates.append(Template(index, _between(model, wanted, boundaries), hidden_in, hidden_out))
    return templates


def _norm_input(model: ir.Model, weight: str) -> ir.Value:
    for node in model.graph:
        if node.op_type == "RMSNormalization" and node.inputs[1] is not None and node.inputs[1].name == weight:
            if node.inputs[0] is None:
                break
            return node.inputs[0]
    raise RuntimeError(f"the fused template has no RMSNormalization by {weight}")


def _between(model: ir.Model, wanted: list[ir.Value], boundaries: list[ir.Value]) -> list[ir.Node]:
    found: set[ir.Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop().producer()
        if node is None or node in found:
            continue
        found.add(node)
        pending += [value for value in node.inputs if value is not None and value not in boundaries]
    # Shape arithmetic that every layer shares (of input_ids alone) stays outside the layers.
    return [node for node in model.graph if node in found and not _is_shared(node)]


def _is_shared(node: ir.Node) -> bool:
    """Whether a node depends only on token inputs and constants, never on a weight, a cache or the residual stream."""
    pending = [node]
    seen = {node}
    while pending:
        for value in pending.pop().inputs:
            if value is None or (value.const_value is not None and not _LAYER.match(value.name or "")):
                continue
            producer = value.producer()
            if producer is None:
                if value.name not in (names.INPUT_IDS, names.POSITION_IDS, names.CACHE_POSITION, names.LOGITS_INDEX):
                    return False
            elif producer not in seen:
                seen.add(producer)
                pending.append(producer)
    return True


class _Copier:
    """Builds the new graph's values; shared ones once, a layer's ones per layer."""

    def __init__(self, fused: ir.Model, traced: TracedModel, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._representative = traced.representative
        self._values: dict[ir.Value, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        for value in fused.graph.inputs:
            if not _CACHE.match(value.name or ""):
                self.inputs.append(self.bind(value, _copied(value, value.name)))

    def bind(self, old: ir.Value, new: ir.Value) -> ir.Value:
        self._values[old] = new
        return new

    def value(self, old: ir.Value) -> ir.Value:
        """The new value of one that all layers share; an initializer is created on first use."""
        if old not in self._values:
            if old.const_value is None:
                raise RuntimeError(f"value {old.name} is used before it is made")
            self.initializers.append(self.bind(old, _copied(old, old.name, self._unsealed(old.const_value))))
        return self._values[old]

    def shared_node(self, node: ir.Node) -> ir.Node:
        """Copy a node outside the layers."""
        return self._copy_node(node, self.value, self.bind, lambda name: name)

    def layer(
        self, template: Template, layer: int, hidden: ir.Value
    ) -> tuple[list[ir.Node], ir.Value, dict[str, ir.Value]]:
        """Copy one layer: its nodes, the residual stream after it and its present caches by name."""
        own: dict[ir.Value, ir.Value] = {template.hidden_in: hidden}
        present: dict[str, ir.Value] = {}

        def rename(name: str | None) -> str | None:
            if name is None:
                return None
            cache = _CACHE.match(name)
            if cache:
                return f"{cache[1]}.{layer}.{cache[3]}"
            renamed, count = _LAYER.subn(f"model.layers.{layer}.", name)
            return renamed if count else f"model.layers.{layer}.{name}"

        def lookup(old: ir.Value) -> ir.Value:
            if old in own:
                return own[old]
            if _CACHE.match(old.name or "") and old.is_graph_input():
                own[old] = _copied(old, rename(old.name))
                self.inputs.append(own[old])
                return own[old]
            if old.const_value is not None and (_LAYER.match(old.name or "") or self._is_of_layer(old.const_value)):
                tensor = self._tensor_of(old.const_value, template.index, layer)
                own[old] = _copied(old, rename(old.name), tensor)
                self.initializers.append(own[old])
                return own[old]
            return self.value(old)

        def keep(old: ir.Value, new: ir.Value) -> ir.Value:
            own[old] = new
            if new.name and _CACHE.match(new.name):
                present[new.name] = new
            return new

        nodes = [self._copy_node(node, lookup, keep, rename) for node in template.nodes]
        return nodes, own[template.hidden_out], present

    def _is_of_layer(self, tensor: ir.TensorProtocol) -> bool:
        return any(_LAYER.match(name) for name in checkpoint_names(tensor))

    def _tensor_of(self, tensor: ir.TensorProtocol, template: int, layer: int) -> ir.TensorProtocol:
        """The same weight expression over the tensors of checkpoint layer ``layer``."""
        source = f"model.layers.{self._representative[template]}."

        def exchange(leaf: ir.TensorProtocol) -> ir.TensorProtocol:
            if not isinstance(leaf, (CheckpointTensor, SealedWeight)):
                return leaf
            if not leaf.checkpoint_name.startswith(source):
                return leaf
            return self._checkpoint.tensor(f"model.layers.{layer}.{leaf.checkpoint_name.removeprefix(source)}")

        return substitute(tensor, exchange)

    def _unsealed(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """The same weight expression over the codes and scales of quantized weights."""

        def exchange(leaf: ir.TensorProtocol) -> ir.TensorProtocol:
            return self._checkpoint.tensor(leaf.checkpoint_name) if isinstance(leaf, SealedWeight) else leaf

        return substitute(tensor, exchange)

    def _copy_node(
        self,
        node: ir.Node,
        lookup: Callable[[ir.Value], ir.Value],
        keep: Callable[[ir.Value, ir.Value], ir.Value],
        rename: Callable[[str | None], str | None],
    ) -> ir.Node:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else lookup(value) for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=rename(node.name),
        )
        copy.metadata_props.update(node.metadata_props)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.shape, new.type = rename(old.name), old.shape, old.type
            keep(old, new)
        return copy


def _copied(value: ir.Value, name: str | None, tensor: ir.TensorProtocol | None = None) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type, const_value=tensor)
