"""Cut a model of full depth into pieces that run one after the other: what precedes the layers, each layer, the rest.

A node belongs to layer i when its name starts with ``model.layers.i.``; a nameless or shared node goes with the first
piece that needs it. Values that cross a cut become outputs of one piece and inputs of later ones.
"""

from __future__ import annotations

import re

import onnx_ir as ir

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def split_by_layer(model: ir.Model) -> list[ir.Model]:
    """The pieces in execution order; initializers are shared with ``model``, not copied."""
    pieces: list[list[ir.Node]] = [[]]
    current: int | None = None
    for node in model.graph:
        found = _LAYER.match(node.name or "")
        layer = int(found[1]) if found else None
        if layer is not None and layer != current and layer >= (current or 0) and pieces[-1]:
            pieces.append([])
        if layer is not None:
            current = layer
        elif current is not None and pieces[-1] and _LAYER.match(pieces[-1][-1].name or ""):
            pieces.append([])
        pieces[-1].append(node)
    owner = {node: index for index, nodes in enumerate(pieces) for node in nodes}
    return [_piece(model, nodes, index, owner) for index, nodes in enumerate(pieces)]


def _piece(model: ir.Model, nodes: list[ir.Node], index: int, owner: dict[ir.Node, int]) -> ir.Model:
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
