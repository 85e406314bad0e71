"""``Gemm`` as exporters write a linear layer on [T, C] -> ``MatMul`` with [in, out] weights (+ ``Add``)."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.graph_passes import infra
from qwenforge.graph_passes.infra import FusionPass, add_initializer, float_attribute, int_attribute, tag


class GemmToMatMul(FusionPass):
    """Write every Gemm by a weight as MatMul and Add, the form that the other rules expect."""

    name: ClassVar[str] = "gemm_to_matmul"

    def run(self, model: ir.Model) -> None:
        transposed: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            if node.op_type == "Gemm" and not node.domain:
                self._rewrite(model, node, transposed)

    def _rewrite(self, model: ir.Model, node: ir.Node, transposed: dict[ir.Value, ir.Value]) -> None:
        x, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        assert x is not None and weight is not None
        tensor = infra.weight(weight)
        if int_attribute(node, "transB", 0) and tensor is None:
            self.fail("a Gemm by the transpose of something that is not a weight", node)
            return
        factors = float_attribute(node, "alpha", 1.0), float_attribute(node, "beta", 1.0)
        if int_attribute(node, "transA", 0) or factors[0] != 1.0 or (bias is not None and factors[1] != 1.0):
            self.fail("a Gemm that scales or transposes its input", node)
            return
        if int_attribute(node, "transB", 0):
            if weight not in transposed:
                assert tensor is not None
                plan = weights.transpose(tensor, [1, 0])
                transposed[weight] = add_initializer(model, f"{weight.name}.transposed", plan)
            weight = transposed[weight]
        old = node.outputs[0]
        product = tag(ir.node("MatMul", [x, weight], name=node.name), self.name)
        nodes, new = [product], product.outputs[0]
        new.shape, new.type = old.shape, old.type
        if bias is not None:
            new.name = f"{old.name}.product"
            added = tag(ir.node("Add", [new, bias], name=f"{node.name}.bias"), self.name)
            new = added.outputs[0]
            new.shape, new.type = old.shape, old.type
            nodes.append(added)
        model.graph.insert_before(node, nodes)
        new.name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        self.matches += 1
