"""A vocabulary projection tied to the embedding reads the one table through a Transpose, so that it is stored once."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge.graph_passes.infra import FusionPass, tag
from qwenforge.graph_passes.lower.ort_linear import tied_projections


class TransposeTiedVocabulary(FusionPass):
    """``x @ W`` with W the transpose of the embedding table -> ``x @ Transpose(table)``."""

    name: ClassVar[str] = "tied_vocabulary_transpose"

    def run(self, model: ir.Model) -> None:
        for node, table in tied_projections(model):
            weight = node.inputs[1]
            turned = tag(ir.node("Transpose", [table], {"perm": [1, 0]}, name=f"{node.name}.weight"), self.name)
            turned.outputs[0].name = f"{node.name}.weight.transposed"
            if weight is not None:
                turned.outputs[0].shape, turned.outputs[0].type = weight.shape, weight.type
            model.graph.insert_before(node, turned)
            node.replace_input_with(1, turned.outputs[0])
            self.matches += 1
