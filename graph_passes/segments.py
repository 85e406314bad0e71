"""Cut a model of full depth into pieces that run one after the other: what precedes the layers, each layer, the rest.

A node belongs to layer i when its name starts with ``model.layers.i.``. Of the others, those that lead to a layer
without coming from one precede the layers; any other goes with the first piece that needs it. Values that cross a cut
become outputs of one piece and inputs of later ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.graph_passes.infra import consumers

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def split_by_layer(model: ir.Model) -> list[ir.Model]:
    """The pieces in execution order, none empty; initializers are shared with ``model``, not copied.

    Raises:
        GraphError: a layer reads what a later one makes, so that no order of whole layers computes the model.
    """
    return split_by_owner(model, _owners(model))


def split_by_owner(model: ir.Model, owner: Mapping[ir.Node, int]) -> list[ir.Model]:
    """The pieces in the order of their numbers, none empty; no node may read what a piece of a larger number makes.

    Args:
        model: the model; its initializers are shared with the pieces, not copied.
        owner: the piece of each node.
    """
    pieces: dict[int, list[ir.Node]] = {}
    for node in model.graph:
        pieces.setdefault(owner[node], []).append(node)
    return [_piece(model, pieces[index], index, owner) for index in sorted(pieces)]


def _owners(model: ir.Model) -> dict[ir.Node, int]:
    """Each node's piece: 0 before the layers, i + 1 for layer i, the largest number for the rest."""
    nodes = list(model.graph)
    named = {node: int(found[1]) + 1 for node in nodes if (found := _LAYER.match(node.name or ""))}
    rest = max(named.values(), default=0) + 1
    after_layers = set(named)
    for node in nodes:
        if any(value is not None and value.producer() in after_layers for value in node.inputs):
            after_layers.add(node)
    owner: dict[ir.Node, int] = {}
    for node in reversed(nodes):
        users = [owner[user] for value in node.outputs for user in consumers(value)]
        needed = min(users, default=rest)
        if node in named:
            owner[node] = named[node]
            if needed < named[node]:
                raise GraphError(f"layer {needed - 1} reads what node {node.name} of a later layer makes.")
        else:
            owner[node] = 0 if node not in after_layers and needed < rest else needed
    return owner


def _piece(model: ir.Model, nodes: list[ir.Node], index: int, owner: Mapping[ir.Node, int]) -> ir.Model:
    mapping: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    initializers: list[ir.Value] = []

    def lookup(value: ir.Value) -> ir.Value:
        if value not in mapping:
            copy = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
            mapping[value] = copy
            (initializers if value.const_value is not None else inputs).append(copy)
        return mapping[value]

    copies = []
    for node in nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else lookup(value) for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            mapping[old] = new
        copies.append(copy)
    outputs = [
        mapping[value]
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(owner[user] != index for user, _ in value.uses())
    ]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=copies,
        initializers=initializers,
        opset_imports=dict(model.graph.opset_imports),
        name=f"piece_{index}",
    )
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
