"""Merged projections taken apart again: the inverse of gate/up merging.

Weights that must stay the checkpoint's are never merged; of quantized ones, one product saves less than the Split behind
it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.quantized_weights import as_quantized
from qwenforge.exporter.transforms import Concat
from qwenforge.graph_passes.infra import (
    FusionPass,
    add_initializer,
    int_attribute,
    integers,
    single_consumer,
    tag,
    weight,
)


class UnmergeProjections(FusionPass):
    """``Split(x @ [W1 | W2])`` -> ``x @ W1`` and ``x @ W2`` where the plan of the weight joins just these two."""

    name: ClassVar[str] = "unmerge_projections"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            plan = weight(node.inputs[1]) if node.op_type == "MatMul" and not node.domain else None
            if not isinstance(plan, weights.DerivedTensor) or plan.transform != Concat(1):
                continue
            split = single_consumer(node.outputs[0])
            if split is None or _widths(split) != [weights.dims(source)[1] for source in plan.sources]:
                self.fail("the merged product is not split into its parts", node)
                continue
            _replace(model, node, split, plan.sources, self.name)
            self.matches += 1


class UnmergeQuantizedProjections(FusionPass):
    """``Split(x @ W)`` -> a product for each part of the rows of a quantized ``W``."""

    name: ClassVar[str] = "unmerge_quantized_projections"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            plan = weight(node.inputs[1]) if node.op_type == "MatMul" and not node.domain else None
            if plan is None or len(plan.shape) != 2:
                continue
            rows = weights.transpose(plan, (1, 0))
            split = single_consumer(node.outputs[0]) if as_quantized(rows) is not None else None
            widths = _widths(split) if split is not None else None
            if split is None or widths is None:
                continue
            ends = [sum(widths[: index + 1]) for index in range(len(widths))]
            cut = [weights.slice_(rows, 0, end - width, end) for width, end in zip(widths, ends, strict=True)]
            _replace(model, node, split, [weights.transpose(part, (1, 0)) for part in cut], self.name)
            self.matches += 1


def _replace(model: ir.Model, node: ir.Node, split: ir.Node, parts: Sequence[ir.TensorProtocol], rule: str) -> None:
    """Products by ``parts`` in place of ``node``, the product by all of them, and of ``split`` behind it."""
    merged = node.inputs[1]
    assert merged is not None
    for index, (old, part) in enumerate(zip(split.outputs, parts, strict=True)):
        stored = add_initializer(model, f"{merged.name}.{index}", part)
        product = tag(ir.node("MatMul", [node.inputs[0], stored], name=f"{node.name}.{index}"), rule)
        new = product.outputs[0]
        new.shape, new.type = old.shape, old.type
        model.graph.insert_before(split, product)
        new.name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    model.graph.remove([split, node], safe=True)


def _widths(split: ir.Node) -> list[int] | None:
    """Into which widths ``split`` cuts the last axis; None where it is no Split or cuts another axis."""
    value = split.inputs[0]
    if split.op_type != "Split" or split.domain or value is None or value.shape is None:
        return None
    if int_attribute(split, "axis", 0) not in (-1, len(value.shape) - 1):
        return None
    if len(split.inputs) > 1 and split.inputs[1] is not None:
        return integers(split.inputs[1])
    width = value.shape[-1]
    if not isinstance(width, int) or width % len(split.outputs):
        return None
    return [width // len(split.outputs)] * len(split.outputs)
