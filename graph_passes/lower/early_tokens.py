"""Choose the tokens whose logits are wanted before the last layer's products by token, not behind them.

Of a prompt's tokens all but the last are there for their keys and values. The last layer's output projection and its
feed-forward part or experts are therefore computed for the chosen tokens only: ``GatherND`` moves up to the results of
attention and to the residual. Of 24 layers that is 4 % of a prompt's time, of few layers with experts a fifth.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.functions import MIXTURE_OF_EXPERTS, QUANTIZED_EXPERTS
from qwenforge.graph_passes.infra import (
    FusionPass,
    constant,
    int_attribute,
    is_op,
    rank,
    static_dim,
    tag,
    weight,
)

_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Cast", "Sigmoid", "Swish", "QuantizeLinear", "DequantizeLinear"}
_LAST_AXIS = {"RMSNormalization", "Softmax", "Split"}
_DEFAULT_AXIS = {"RMSNormalization": -1, "Softmax": -1, "Split": 0}
_CHOSEN = (names.BATCH, names.LOGITS_COUNT)
_EXPERTS = {MIXTURE_OF_EXPERTS, QUANTIZED_EXPERTS}


class ChooseTokensEarly(FusionPass):
    """Move the GatherND by ``logits_index`` up through everything that treats each token alone."""

    name: ClassVar[str] = "choose_tokens_early"

    def run(self, model: ir.Model) -> None:
        gather = _gather(model)
        hidden = gather.inputs[0] if gather is not None else None
        if gather is None or hidden is None:
            return
        if hidden.shape is None:
            self.fail(f"the shape of {hidden.name} is not known", gather)
            return
        tokens = hidden.shape[:2]
        nodes = _by_token(model, gather)
        entering = _entering(nodes)
        if not any(node.op_type == "MatMul" for node in nodes):
            self.fail("no product lies between what mixes tokens and their choice", gather)
            return
        results = [output for node in nodes for output in node.outputs if rank(output) == 3]
        for value in (*entering, *results):
            if rank(value) != 3 or value.shape is None or value.shape[:2] != tokens:
                self.fail(f"{value.name} is no [batch, sequence, channels] tensor", gather)
                return
        self._move(model, gather, nodes, entering)
        self.matches = 1

    def _move(self, model: ir.Model, gather: ir.Node, nodes: list[ir.Node], entering: list[ir.Value]) -> None:
        hidden, index = gather.inputs
        unsqueeze = index.producer() if index is not None else None
        assert hidden is not None and unsqueeze is not None
        model.graph.remove(unsqueeze)
        model.graph.insert_before(nodes[0], unsqueeze)
        for value in entering:
            self._choose(model, value, index, [node for node in nodes if value in node.inputs])
        for node in nodes:
            if node.op_type == "Reshape":
                node.replace_input_with(1, self._shape(model, node, nodes[0]))
            for output in node.outputs:
                assert output.shape is not None
                leading = _CHOSEN if len(output.shape) == 3 else (None,)
                output.shape = ir.Shape([*leading, output.shape[-1]])
        gather.outputs[0].replace_all_uses_with(hidden, replace_graph_outputs=True)
        model.graph.remove(gather, safe=True)

    def _choose(self, model: ir.Model, value: ir.Value, index: ir.Value | None, users: list[ir.Node]) -> None:
        """Give ``users``, in order, the chosen tokens of ``value``."""
        gather = ir.node("GatherND", [value, index], {"batch_dims": 1}, name=f"chosen.{value.name}")
        chosen = tag(gather, self.name).outputs[0]
        assert value.shape is not None
        chosen.name, chosen.type = f"chosen.{value.name}.output", value.type
        chosen.shape = ir.Shape([*_CHOSEN, value.shape[2]])
        model.graph.insert_before(users[0], gather)
        for user in users:
            for position, given in enumerate(user.inputs):
                if given is value:
                    user.replace_input_with(position, chosen)

    def _shape(self, model: ir.Model, reshape: ir.Node, first: ir.Node) -> ir.Value:
        """What ``reshape`` makes of chosen tokens: rows of them, or [B, N, C] again."""
        channels = static_dim(reshape.outputs[0], -1)
        if rank(reshape.outputs[0]) == 2:
            return constant(model, f"chosen.rows_of_{channels}", np.array([-1, channels], np.int64))
        width = constant(model, f"chosen.width_{channels}", np.array([channels], np.int64))
        index = next(value for value in model.graph.inputs if value.name == names.LOGITS_INDEX)
        counts = tag(ir.node("Shape", [index], name=f"chosen.counts.{reshape.name}"), self.name)
        joined = tag(
            ir.node("Concat", [counts.outputs[0], width], {"axis": 0}, name=f"chosen.shape.{reshape.name}"), self.name
        )
        for node, length in ((counts, 2), (joined, 3)):
            node.outputs[0].name = f"{node.name}.output"
            node.outputs[0].shape, node.outputs[0].type = ir.Shape([length]), ir.TensorType(ir.DataType.INT64)
        model.graph.insert_before(first, [counts, joined])
        return joined.outputs[0]


def _gather(model: ir.Model) -> ir.Node | None:
    """The GatherND that chooses tokens by the graph's ``logits_index``."""
    for node in model.graph:
        if node.op_type != "GatherND" or node.domain or int_attribute(node, "batch_dims", 0) != 1:
            continue
        unsqueeze = is_op(node.inputs[1], "Unsqueeze") if node.inputs[1] is not None else None
        index = unsqueeze.inputs[0] if unsqueeze is not None else None
        if index is not None and index.is_graph_input() and index.name == names.LOGITS_INDEX:
            return node
    return None


def _by_token(model: ir.Model, gather: ir.Node) -> list[ir.Node]:
    """Nodes, in order, that treat each token alone and whose results serve nothing but ``gather``."""
    found: set[ir.Node] = {gather}
    for node in reversed(model.graph):
        users = {user for output in node.outputs for user, _ in output.uses()}
        graph_output = any(output.is_graph_output() for output in node.outputs)
        if node is not gather and users and users <= found and not graph_output and _treats_tokens_alone(node):
            found.add(node)
    return [node for node in model.graph if node in found and node is not gather]


def _entering(nodes: list[ir.Node]) -> list[ir.Value]:
    """Activations that ``nodes`` read and others computed."""
    made = {output for node in nodes for output in node.outputs}
    read = [value for node in nodes for value in _activations(node)]
    return list(dict.fromkeys(value for value in read if value not in made))


def _activations(node: ir.Node) -> list[ir.Value]:
    given = node.inputs[:1] if node.op_type == "Reshape" else node.inputs
    return [value for value in given if value is not None and weight(value) is None]


def _treats_tokens_alone(node: ir.Node) -> bool:
    if any(output.shape is None or len(output.shape) not in (2, 3) for output in node.outputs):
        return False
    constants = [value for value in node.inputs if value is not None and weight(value) is not None]
    if node.domain:
        return node.domain == names.DOMAIN and node.op_type in _EXPERTS and len(_activations(node)) == 2
    if node.op_type == "MatMul":
        return weight(node.inputs[0]) is None and rank(node.inputs[1]) == 2 and len(constants) == 1
    if node.op_type == "Reshape":
        return _keeps_channels(node)
    if not all((rank(value) or 0) <= 1 for value in constants):
        return False
    if node.op_type in _LAST_AXIS:
        value = node.inputs[0]
        axis = int_attribute(node, "axis", _DEFAULT_AXIS[node.op_type])
        return axis in (-1, (rank(value) or 0) - 1) and len(_activations(node)) == 1
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return all(rank(value) == 0 for value in constants) and len(_activations(node)) == 1
    return (
        node.op_type in _ELEMENTWISE and len({_tokens(value) for value in (*_activations(node), node.outputs[0])}) == 1
    )


def _tokens(value: ir.Value) -> tuple[object, ...] | None:
    """The dimensions in front of the channels."""
    return tuple(value.shape[:-1]) if value.shape is not None else None


def _keeps_channels(node: ir.Node) -> bool:
    """Whether a Reshape makes rows of tokens of [B, S, C], or the other way round."""
    before, after = node.inputs[0], node.outputs[0]
    channels = static_dim(before, -1)
    return {rank(before), rank(after)} == {2, 3} and channels is not None and channels == static_dim(after, -1)
