"""Cut the part of a graph that computes some values and run it on its own.

Masks and rotary tables depend on token positions, never on weights; whatever way an exporter wrote them down, running
the few nodes that make them shows what they are. That is how the attention and RoPE fusions *prove* a match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError


def ancestors(values: Sequence[ir.Value], stop: Sequence[ir.Value] = ()) -> list[ir.Node]:
    """Nodes needed to compute ``values``, in topological order; the search does not go beyond ``stop``."""
    barrier = set(stop)
    found: set[ir.Node] = set()
    pending = [value for value in values if value not in barrier]
    while pending:
        node = pending.pop().producer()
        if node is None or node in found:
            continue
        found.add(node)
        pending += [value for value in node.inputs if value is not None and value not in barrier]
    if not found:
        return []
    graph = next(iter(found)).graph
    if graph is None:
        raise GraphError("a node of the subgraph belongs to no graph")
    return [node for node in graph if node in found]


def leaves(nodes: Sequence[ir.Node], values: Sequence[ir.Value]) -> list[ir.Value]:
    """Values that ``nodes`` (or ``values`` directly) read and do not produce, without initializers, in order of use."""
    produced = {output for node in nodes for output in node.outputs}
    read = [value for node in nodes for value in node.inputs if value is not None]
    read += [value for value in values if value not in produced]
    return [value for value in dict.fromkeys(read) if value not in produced and value.const_value is None]


def extract(values: Sequence[ir.Value], inputs: Sequence[ir.Value], opset: int) -> ir.Model:
    """A model of its own that computes ``values`` from ``inputs``; initializers are shared, not copied.

    Raises:
        GraphError: a value depends on something that is neither in ``inputs`` nor an initializer.
    """
    nodes = ancestors(values, inputs)
    missing = [leaf.name for leaf in leaves(nodes, values) if leaf not in set(inputs)]
    if missing:
        raise GraphError(f"the subgraph also reads {', '.join(map(str, missing))}")
    mapping: dict[ir.Value, ir.Value] = {}
    new_inputs = []
    for value in inputs:
        mapping[value] = ir.Value(name=value.name, shape=value.shape, type=value.type)
        new_inputs.append(mapping[value])
    initializers: list[ir.Value] = []
    for value in dict.fromkeys(v for node in nodes for v in node.inputs if v is not None):
        if value.const_value is not None and value not in mapping and value.producer() is None:
            mapping[value] = ir.Value(
                name=value.name, shape=value.shape, type=value.type, const_value=value.const_value
            )
            initializers.append(mapping[value])
    new_nodes = []
    for node in nodes:
        clone = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else mapping[value] for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for old, new in zip(node.outputs, clone.outputs, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            mapping[old] = new
        new_nodes.append(clone)
    outputs = []
    for value in values:
        if value in set(inputs):
            raise GraphError(f"{value.name} is an input of the subgraph, not computed by it")
        outputs.append(mapping[value])
    graph = ir.Graph(
        new_inputs, outputs, nodes=new_nodes, initializers=initializers, opset_imports={"": opset}, name="subgraph"
    )
    return ir.Model(graph, ir_version=10)


def evaluate(
    values: Sequence[ir.Value], feeds: Mapping[ir.Value, npt.NDArray[np.generic]], opset: int
) -> list[npt.NDArray[np.generic]]:
    """Compute ``values`` from ``feeds`` with ONNX's reference implementation (every dtype, bf16 included).

    Raises:
        GraphError: a value depends on something that is not fed.
    """
    from onnx.reference import ReferenceEvaluator

    model = extract(values, list(feeds), opset)
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    used = {value.name for value in model.graph.inputs}
    named = {str(value.name): array for value, array in feeds.items() if value.name in used}
    return [np.asarray(result) for result in evaluator.run(None, named)]
