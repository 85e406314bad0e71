"""Which decoder layer each node of an ONNX graph belongs to: ours, or anybody's.

A node says so itself by its name (``model.layers.3.mlp...``, ``/model/layers.3/...``) or by PyTorch's record of module
scopes. Else it is told by the weights and caches that only it touches, and what lies between nodes of one layer
belongs to it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Node metadata of PyTorch's exporter: the modules around the node, outermost first, as a Python list."""

_LAYER = re.compile(r"(?:^|[./_])(?:layers|layer|blocks|h)[./_](\d+)(?=[./_]|$)")
_CACHE = re.compile(r"^(?:past_key_values|past|present_key_values|present)[._](\d+)[._]")


@dataclass(frozen=True)
class LayerMap:
    """The layer of each node that has one, and what told it: ``source`` is None when no layers were recognized."""

    of: Mapping[ir.Node, int]
    source: str | None

    @property
    def indices(self) -> tuple[int, ...]:
        """The layers' numbers, rising."""
        return tuple(sorted(set(self.of.values())))

    def nodes(self, index: int) -> list[ir.Node]:
        """The nodes of layer ``index`` in graph order."""
        return [node for node, layer in self.of.items() if layer == index]


def layer_in_name(name: str | None) -> int | None:
    """The layer number that ``name`` contains, or None."""
    match = _LAYER.search(name or "")
    return int(match[1]) if match else None


def innermost_scope(node: ir.Node) -> str:
    """The innermost module that PyTorch recorded around ``node``, or an empty string."""
    # The list's last entry is the node's own name, the one before it the module.
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES_KEY, ""))
    return scopes[-2] if len(scopes) > 1 else ""


def recognize_layers(graph: ir.Graph) -> LayerMap:
    """Assign the nodes of ``graph`` (not of its subgraphs, which go with their node) to layers."""
    nodes = list(graph)
    seeds: dict[ir.Node, int] = {}
    counts = {"node names": 0, "module scopes": 0, "weight and cache names": 0}
    cache_inputs = {value for value in graph.inputs if _CACHE.match(value.name or "")}
    cache_outputs = {value for value in graph.outputs if _CACHE.match(value.name or "")}
    for node in nodes:
        for source, layer in (
            ("node names", layer_in_name(node.name)),
            ("module scopes", layer_in_name(innermost_scope(node))),
            ("weight and cache names", _layer_touched(node, cache_inputs, cache_outputs)),
        ):
            if layer is not None:
                seeds[node] = layer
                counts[source] += 1
                break
    if not seeds:
        return LayerMap({}, None)
    return LayerMap(_fill_between(nodes, seeds), max(counts, key=lambda source: counts[source]))


def _layer_touched(node: ir.Node, cache_inputs: set[ir.Value], cache_outputs: set[ir.Value]) -> int | None:
    if node.op_type == "Shape":  # asks for a size that the whole graph may use
        return None
    for value in node.inputs:
        # A tensor shared by several nodes may carry the name of the layer that happened to come first.
        own = value is not None and value.is_initializer() and len(value.consumers()) == 1
        if value is not None and own and (layer := layer_in_name(value.name)) is not None:
            return layer
    touched = [value for value in node.inputs if value in cache_inputs]
    touched += [value for value in node.outputs if value in cache_outputs]
    for value in touched:
        if match := _CACHE.match(value.name or ""):
            return int(match[1])
    return None


def _fill_between(nodes: list[ir.Node], seeds: Mapping[ir.Node, int]) -> dict[ir.Node, int]:
    """Add the nodes on a path from a layer's node to one of the same or a later layer: they go with the first."""
    after: dict[ir.Node, int] = {}
    for node in nodes:
        makers = (value.producer() for value in node.inputs if value is not None)
        found = [after[maker] for maker in makers if maker is not None and maker in after]
        if node in seeds or found:
            after[node] = seeds[node] if node in seeds else max(found)
    before: dict[ir.Node, int] = {}
    for node in reversed(nodes):
        users = (user for value in node.outputs for user, _ in value.uses())
        found = [before[user] for user in users if user in before]
        if node in seeds or found:
            before[node] = seeds[node] if node in seeds else min(found)
    layers: dict[ir.Node, int] = {}
    for node in nodes:
        if node in seeds:
            layers[node] = seeds[node]
        elif node in after and node in before and before[node] >= after[node]:
            layers[node] = after[node]
    return layers
