"""``com.microsoft::GroupQueryAttention`` -> ``qwenforge.cpu::CachedAttention``, which reads each key once a group."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge.graph_passes.infra import FusionPass, replace_node
from qwenforge.graph_passes.lower.cpu_ops import ATTENTION, MICROSOFT, make

_KEY, _VALUE = 1, 2


class UseCachedAttention(FusionPass):
    """Rename every node with packed queries, keys and values in fp32; inputs and attributes are the same."""

    name: ClassVar[str] = "cpu_attention"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.op_type != "GroupQueryAttention" or node.domain != MICROSOFT:
                continue
            if node.inputs[_KEY] is not None or node.inputs[_VALUE] is not None:
                self.fail("queries, keys and values are not packed", node)
                continue
            query = node.inputs[0]
            if query is None or query.dtype != ir.DataType.FLOAT:
                self.fail("it is not in fp32", node)
                continue
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            attention = make(model, ATTENTION, list(node.inputs), attributes, node.name, self.name)
            attention.resize_outputs(len(node.outputs))
            replace_node(model, node, [attention], attention.outputs)
            self.matches += 1
