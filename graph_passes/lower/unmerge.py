"""Merged projections taken apart again, for weights that must stay the checkpoint's: the inverse of gate/up merging."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.transforms import Concat
from qwenforge.graph_passes.infra import FusionPass, add_initializer, int_attribute, integers, single_consumer, tag


class UnmergeProjections(FusionPass):
    """``Split(x @ [W1 | W2])`` -> ``x @ W1`` and ``x @ W2`` where the plan of the weight joins just these two."""

    name: ClassVar[str] = "unmerge_projections"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            weight = node.inputs[1] if node.op_type == "MatMul" and not node.domain else None
            plan = weight.const_value if weight is not None else None
            if not isinstance(plan, weights.DerivedTensor) or plan.transform != Concat(1):
                continue
            split = single_consumer(node.outputs[0])
            if split is None or not _divides(split, [weights.dims(source)[1] for source in plan.sources]):
                self.fail("the merged product is not split into its parts", node)
                continue
            for index, (old, source) in enumerate(zip(split.outputs, plan.sources, strict=True)):
                part = add_initializer(model, f"{weight.name if weight is not None else ''}.{index}", source)
                product = tag(ir.node("MatMul", [node.inputs[0], part], name=f"{node.name}.{index}"), self.name)
                new = product.outputs[0]
                new.shape, new.type = old.shape, old.type
                model.graph.insert_before(split, product)
                new.name, old.name = old.name, None
                old.replace_all_uses_with(new, replace_graph_outputs=True)
            model.graph.remove([split, node], safe=True)
            self.matches += 1


def _divides(split: ir.Node, widths: list[int]) -> bool:
    """Whether ``split`` cuts the last axis into ``widths``."""
    value = split.inputs[0]
    if split.op_type != "Split" or split.domain or value is None or value.shape is None:
        return False
    if int_attribute(split, "axis", 0) not in (-1, len(value.shape) - 1) or len(split.outputs) != len(widths):
        return False
    if len(split.inputs) > 1 and split.inputs[1] is not None:
        return integers(split.inputs[1]) == widths
    return len(set(widths)) == 1
