"""Residual addition and the norm behind it -> ``com.microsoft::SkipSimplifiedLayerNormalization``."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge.graph_passes.infra import FusionPass, float_attribute, int_attribute, is_op, tag


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
            reason = _obstacle(added, node)
            if reason is not None:
                self.fail(reason, node)
                continue
            self._rewrite(model, added, node)

    def _rewrite(self, model: ir.Model, added: ir.Node, norm: ir.Node) -> None:
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*added.inputs, norm.inputs[1]],
            {"epsilon": float_attribute(norm, "epsilon", 1e-5)},
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


def _obstacle(added: ir.Node, norm: ir.Node) -> str | None:
    """Why the two nodes are not one residual norm of the kernel's kind, None when they are."""
    first, second = added.inputs
    scale, total = norm.inputs[1], added.outputs[0]
    if any(value is None or value.const_value is not None for value in (first, second)):
        return "a constant is added before the norm"
    if not _same_shape(first, second):
        return "the sum before the norm broadcasts, or its operands' shapes are unknown"
    if int_attribute(norm, "axis", -1) not in (-1, 2):
        return "the norm is not over the last axis"
    if int_attribute(norm, "stash_type", ir.DataType.FLOAT) != ir.DataType.FLOAT:
        return "the norm does not compute in fp32"
    if scale is None or scale.producer() is not None or scale.dtype != total.dtype:
        return "the norm's scale is computed, or of another dtype than what it scales"
    return None


def _same_shape(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether both are [B, S, C] of one C; a dimension of 1 against another would broadcast."""
    if first is None or second is None or first.shape is None or second.shape is None:
        return False
    if len(first.shape) != 3 or len(second.shape) != 3 or not isinstance(first.shape[2], int):
        return False
    broadcasts = any((one == 1) != (other == 1) for one, other in zip(first.shape, second.shape, strict=True))
    return first.shape[2] == second.shape[2] and not broadcasts
