"""Expert routing: softmax, top-k, optional renormalization, experts, weighted sum -> ``qwenforge::MixtureOfExperts``.

Exporters write the experts in very different ways (gathering each token's matrices, or sorting tokens by expert and
splitting). The routing in front of them and the sum behind them look alike, so those two ends are matched by structure;
what lies between is either the gathered form, matched node by node (:mod:`gathered_experts`), or proven by running it
on a few tokens (:mod:`expert_proof`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.errors import GraphError
from qwenforge.graph_passes.functions import MIXTURE_OF_EXPERTS, register_function
from qwenforge.graph_passes.fuse.expert_proof import prove_experts
from qwenforge.graph_passes.fuse.gathered_experts import match_gathered
from qwenforge.graph_passes.infra import (
    FusionPass,
    add_initializer,
    consumers,
    int_attribute,
    integers,
    is_op,
    layer_scope,
    scalar,
    static_dim,
    tag,
)


@dataclass(frozen=True)
class Routing:
    """What is known from the two ends.

    Attributes:
        top_k_node: chooses the experts.
        router_logits: [T, E].
        weights, chosen: combine weights and expert ids [T, K], weights renormalized if ``normalize``.
        top_k: K.
        normalize: whether the weights are divided by their sum.
        x: the tokens [T, C].
        same_tokens: every [T, C] value that is a reshape of the same tokens, ``x`` included.
        output: the weighted sum [T, C].
    """

    top_k_node: ir.Node
    router_logits: ir.Value
    weights: ir.Value
    chosen: ir.Value
    top_k: int
    normalize: bool
    x: ir.Value
    same_tokens: frozenset[ir.Value]
    output: ir.Value


@dataclass(frozen=True)
class Experts:
    """Expert weights in the fused node's layout: gate_up [E, 2I, C] and down [E, C, I]."""

    gate_up: ir.TensorProtocol
    down: ir.TensorProtocol
    gate_up_name: str
    down_name: str


class FuseMixtureOfExperts(FusionPass):
    """Fuse every routed feed-forward; a shared expert beside it stays as it is."""

    name: ClassVar[str] = "moe_routing"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.op_type != "TopK" or node.domain or node.graph is None or _sorts_by_expert(node):
                continue
            try:
                routing = _match_ends(node)
                found = match_gathered(
                    routing.x,
                    routing.weights,
                    routing.chosen,
                    routing.output,
                    experts=static_dim(routing.router_logits, -1),
                    top_k=routing.top_k,
                )
                if found is not None:
                    experts = Experts(*found)
                else:
                    experts = Experts(
                        *prove_experts(
                            model,
                            x=routing.x,
                            same_tokens=routing.same_tokens,
                            router_logits=routing.router_logits,
                            output=routing.output,
                            top_k=routing.top_k,
                            normalize=routing.normalize,
                        )
                    )
            except GraphError as error:
                self.fail(str(error), node)
                continue
            self._rewrite(model, routing, experts)

    def _rewrite(self, model: ir.Model, routing: Routing, experts: Experts) -> None:
        register_function(model, MIXTURE_OF_EXPERTS)
        scope = _scope(routing, experts) or f"moe.{self.matches}."
        operands = [routing.x, routing.router_logits]
        for name, tensor in ((experts.gate_up_name, experts.gate_up), (experts.down_name, experts.down)):
            held = model.graph.initializers.get(name)
            same = held is not None and held.const_value is tensor
            operands.append(held if held is not None and same else add_initializer(model, f"{name}.experts", tensor))
        node = ir.node(
            MIXTURE_OF_EXPERTS,
            operands,
            {"top_k": routing.top_k, "normalize_topk": int(routing.normalize)},
            domain=names.DOMAIN,
            name=f"{scope}mlp.experts",
        )
        tag(node, self.name)
        old, new = routing.output, node.outputs[0]
        new.shape, new.type = routing.x.shape, routing.x.type
        producer = old.producer()
        assert producer is not None
        model.graph.insert_before(producer, node)
        new.name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.matches += 1


def _scope(routing: Routing, experts: Experts) -> str:
    """``model.layers.0.`` as told by the names of values, weights or PyTorch's module scopes."""
    told = (str(routing.output.name), experts.gate_up_name, *routing.top_k_node.metadata_props.values())
    return next((scope for name in told if (scope := layer_scope(ir.Value(name=name)))), "")


def _sorts_by_expert(node: ir.Node) -> bool:
    """Whether this TopK is a full sort of integer expert ids, inside a routing rather than its start."""
    value = node.inputs[0]
    return value is not None and value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def _match_ends(node: ir.Node) -> Routing:
    top_k = integers(node.inputs[1])
    if top_k is None or len(top_k) != 1 or int_attribute(node, "axis", -1) not in (-1, 1):
        raise GraphError("the number of experts per token is not a constant")
    if int_attribute(node, "largest", 1) != 1:
        raise GraphError("the least probable experts are chosen")
    probabilities = node.inputs[0]
    cast = is_op(probabilities, "Cast")
    softmax = is_op(cast.inputs[0] if cast is not None else probabilities, "Softmax")
    if softmax is None:
        raise GraphError("the experts are not chosen by a softmax of the router's logits")
    if int_attribute(softmax, "axis", -1) not in (-1, 1):
        raise GraphError("the router's softmax is not over the experts")
    upcast = is_op(softmax.inputs[0], "Cast")
    logits = upcast.inputs[0] if upcast is not None else softmax.inputs[0]
    projection = is_op(logits, "MatMul")
    if logits is None or projection is None or projection.inputs[0] is None or len(logits.shape or ()) != 2:
        raise GraphError("the router's logits are not a projection of [tokens, hidden] to [tokens, experts]")
    if any(user is not softmax and user is not upcast for user in consumers(logits)):
        raise GraphError("the router's logits have another use")
    weights, normalize = _combine_weights(node.outputs[0])
    tokens = _same_tokens(projection.inputs[0])
    output = _weighted_sum(node, top_k[0], static_dim(projection.inputs[0], -1))
    x = next(value for value in tokens if value in _read_by(output, tokens))
    if output.dtype != x.dtype:
        raise GraphError(f"the experts read {x.dtype} but give {output.dtype}")
    return Routing(node, logits, weights, node.outputs[1], top_k[0], normalize, x, frozenset(tokens), output)


def _combine_weights(values: ir.Value) -> tuple[ir.Value, bool]:
    """The weights after the optional division by their sum and the optional cast."""
    users = consumers(values)
    division = next((user for user in users if user.op_type == "Div"), None)
    if division is not None:
        total = is_op(division.inputs[1], "ReduceSum")
        added = is_op(division.inputs[1], "Add")
        if added is not None and scalar(added.inputs[1]) is not None:
            raise GraphError("a constant is added to the sum of the weights")
        axes = integers(total.inputs[1]) if total is not None and len(total.inputs) > 1 else None
        if division.inputs[0] is not values or total is None or total.inputs[0] is not values:
            raise GraphError("the chosen weights are divided by something other than their sum")
        if axes not in ([-1], [1]) or int_attribute(total, "keepdims", 1) != 1:
            raise GraphError("the chosen weights are summed over another axis than the experts")
        values = division.outputs[0]
    users = consumers(values)
    if len(users) == 1 and users[0].op_type == "Cast":
        values = users[0].outputs[0]
    return values, division is not None


def _same_tokens(x: ir.Value) -> list[ir.Value]:
    """All [T, C] reshapes of the tokens that the router reads, nearest to the source first."""
    base = x
    while (reshape := is_op(base, "Reshape")) is not None and reshape.inputs[0] is not None:
        base = reshape.inputs[0]
    found, pending = [], [base]
    while pending:
        value = pending.pop(0)
        if value.shape is not None and len(value.shape) == 2 and static_dim(value, -1) == static_dim(x, -1):
            found.append(value)
        pending += [user.outputs[0] for user in consumers(value) if user.op_type == "Reshape"]
    return found


def _weighted_sum(node: ir.Node, top_k: int, hidden: int | None) -> ir.Value:
    """The [T, C] sum over the K chosen experts: a ReduceSum over axis 1 of [T, K, C] that depends on the choice."""
    seen, pending = {node}, [node]
    while pending:
        for output in pending.pop(0).outputs:
            for user in consumers(output):
                if user in seen:
                    continue
                seen.add(user)
                if user.op_type == "ReduceSum" and _sums_experts(user, top_k, hidden):
                    summed = user.outputs[0]
                    users = consumers(summed)
                    narrowed = len(users) == 1 and users[0].op_type == "Cast" and summed.dtype == ir.DataType.FLOAT
                    return users[0].outputs[0] if narrowed else summed
                pending.append(user)
    raise GraphError("no sum over the chosen experts follows the router")


def _sums_experts(node: ir.Node, top_k: int, hidden: int | None) -> bool:
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    summed = node.inputs[0]
    while (cast := is_op(summed, "Cast")) is not None:
        summed = cast.inputs[0]
    sizes = static_dim(summed, 1), static_dim(summed, 2)
    return axes in ([1], [-2]) and int_attribute(node, "keepdims", 1) == 0 and sizes == (top_k, hidden)


def _read_by(output: ir.Value, tokens: list[ir.Value]) -> set[ir.Value]:
    """Those of ``tokens`` that the computation of ``output`` reads directly."""
    from qwenforge.graph_passes.subgraph import ancestors

    nodes = ancestors([output], stop=tokens)
    read = {value for node in nodes for value in node.inputs if value is not None}
    found = read & set(tokens)
    if not found:
        raise GraphError("the experts do not read the tokens that the router reads")
    return found
