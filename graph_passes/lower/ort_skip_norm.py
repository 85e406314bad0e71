"""Residual addition and the norm behind it -> ``com.microsoft::SkipSimplifiedLayerNormalization``."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge.graph_passes.infra import FusionPass, int_attribute, is_op, tag


class FuseResidualNorm(FusionPass):
    """``s = a + b; y = RMSNormalization(s)`` in one node with outputs y and s."""

    name: ClassVar[str] = "ort_residual_norm"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.op_type != "RMSNormalization" or node.domain:
                continue
            added = is_op(node.inputs[0], "Add")
            if added is None or added.inputs[0] is None or added.inputs[1] is None:
                continue
            if not _same_shape(added) or int_attribute(node, "axis", -1) not in (-1, 2):
                self.fail("the sum before the norm broadcasts, or the norm is not over the last axis", node)
                continue
            self._rewrite(model, added, node)

    def _rewrite(self, model: ir.Model, added: ir.Node, norm: ir.Node) -> None:
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*added.inputs, norm.inputs[1]],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            domain="com.microsoft",
            num_outputs=4,
            name=norm.name,
        )
        tag(fused, self.name)
        total, output = added.outputs[0], norm.outputs[0]
        model.graph.insert_before(added, fused)
        for old, new in ((output, fused.outputs[0]), (total, fused.outputs[3])):
            new.shape, new.type = old.shape, old.type
            new.name, old.name = old.name, None
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        for unused in fused.outputs[1:3]:
            unused.name = ""
        model.graph.remove([norm, added], safe=True)
        model.graph.opset_imports["com.microsoft"] = 1
        self.matches += 1


def _same_shape(added: ir.Node) -> bool:
    """Whether both operands are known to have the sum's rank and last dimension (a bias has not)."""
    first, second = (value.shape if value is not None else None for value in added.inputs)
    if first is None or second is None:
        return False
    constants = any(value is not None and value.const_value is not None for value in added.inputs)
    return not constants and len(first) == len(second) == 3 and first[2] == second[2]
