"""Read the batch size off ``input_ids`` wherever an exporter read it off a mask or a cache.

``torch.export`` knows that the batch dimensions of all inputs are equal and takes whichever it likes; once a cache has
a fixed capacity or the padding mask is gone, only ``input_ids`` is there to ask.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge.graph_passes.infra import FusionPass, int_attribute, static_dim
from qwenforge.graph_passes.signature import detect_signature


class BatchSizeFromTokens(FusionPass):
    """``Shape(cache or mask, start=0, end=1)`` -> ``Shape(input_ids, start=0, end=1)``."""

    name: ClassVar[str] = "batch_size"

    def run(self, model: ir.Model) -> None:
        signature = detect_signature(model)
        tokens = next(value for value in model.graph.inputs if value.name == signature.input_ids)
        caches = {name for layer in signature.layers for name in (layer.key_input, layer.value_input) if name}
        batched = caches | {name for name in (signature.attention_mask, signature.position_ids) if name}
        for node in model.graph:
            if node.op_type != "Shape" or node.domain or node.inputs[0] is None:
                continue
            if int_attribute(node, "start", 0) != 0 or int_attribute(node, "end", -1) != 1:
                continue
            if node.inputs[0].is_graph_input() and node.inputs[0].name in batched:
                if static_dim(node.inputs[0], 0) != static_dim(tokens, 0):
                    self.fail(f"{node.inputs[0].name} does not have the batch size of {tokens.name}", node)
                    continue
                node.replace_input_with(0, tokens)
                self.matches += 1
