"""``qwenforge::MixtureOfExperts`` with quantized weights -> ``com.microsoft::QMoE``, 4 or 8 bits in blocks.

The kernel ignores ``normalize_routing_weights=0`` and would renormalize (ONNX Runtime 1.32; the answer is then wrong by
half of itself). It is therefore given the probabilities by which experts are weighted as an input of their own
(``router_weights``), and the logits for the choice alone.

Its activations are int8 with a scale for each block of each token, at every accuracy level for 8-bit weights.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.errors import UnsupportedError
from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import BlockWeight, block_size, in_blocks
from qwenforge.exporter.quantized_weights import QuantizedWeight, as_quantized
from qwenforge.exporter.weights import dims
from qwenforge.graph_passes.functions import MIXTURE_OF_EXPERTS
from qwenforge.graph_passes.infra import FusionPass, add_initializer, replace_node, tag, weight
from qwenforge.graph_passes.lower.ort_block_product import MICROSOFT
from qwenforge.graph_passes.lower.ort_quantized_linear import INT8_ACTIVATIONS

_ROUTER_WEIGHTS = 14
"""Position of ``router_weights`` among the inputs; the one before it and all that are not given are empty."""


class LowerQuantizedExperts(FusionPass):
    """Replace every call whose two weights are quantized.

    Raises:
        UnsupportedError: the experts are FP8.
    """

    name: ClassVar[str] = "ort_quantized_moe"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.op_type != MIXTURE_OF_EXPERTS or node.domain != names.DOMAIN:
                continue
            gate_up, down = weight(node.inputs[2]), weight(node.inputs[3])
            if gate_up is None or down is None:
                continue
            first, second = as_quantized(weights.interleave_rows(gate_up)), as_quantized(down)
            if first is None and second is None:
                continue
            if first is None or second is None:
                self.fail("only one of the experts' two weights is quantized", node)
                continue
            if "fp8" in (first.format, second.format):
                raise UnsupportedError(
                    f"{node.name}: ONNX Runtime has no FP8 experts on a CPU; quantize to int8 or int4 for ort-cpu."
                )
            size = _common_block(first, second)
            if size is None:
                self.fail("no block of 16 columns or more divides both weights and their groups", node)
                continue
            self._rewrite(model, node, in_blocks(first, size), in_blocks(second, size))

    def _rewrite(self, model: ir.Model, node: ir.Node, gate_up: BlockWeight, down: BlockWeight) -> None:
        x, logits, first, second = node.inputs
        assert x is not None and logits is not None and first is not None and second is not None
        dtype = x.dtype or ir.DataType.FLOAT
        inputs: list[ir.Value | None] = [x, logits, *[None] * (_ROUTER_WEIGHTS - 1)]
        for stored, value, at in ((gate_up, first, 2), (down, second, 5)):
            inputs[at] = add_initializer(model, f"{value.name}.blocks", stored.codes)
            inputs[at + 1] = add_initializer(model, f"{value.name}.scales", weights.cast(stored.scales, dtype))
        for stored, value, at in ((gate_up, first, 11), (down, second, 12)):
            if stored.zero_points is not None:
                inputs[at] = add_initializer(model, f"{value.name}.zero_points", stored.zero_points)
        normalize = node.attributes["normalize_topk"].as_int()
        nodes = []
        if not normalize:
            # Made only where it is wanted: a node outside the graph would keep the logits alive for ever.
            softmax = ir.node("Softmax", [logits], {"axis": -1}, name=f"{node.name}.probabilities")
            softmax.outputs[0].name = f"{softmax.name}.output"
            softmax.outputs[0].shape, softmax.outputs[0].type = logits.shape, logits.type
            inputs[_ROUTER_WEIGHTS] = softmax.outputs[0]
            nodes.append(softmax)
        experts = ir.node(
            "QMoE",
            inputs,
            {
                "k": node.attributes["top_k"].as_int(),
                "normalize_routing_weights": normalize,
                "activation_type": "swiglu",
                "swiglu_fusion": 1,
                "activation_alpha": 1.0,
                "activation_beta": 0.0,
                "expert_weight_bits": gate_up.bits,
                "fc2_expert_weight_bits": down.bits,
                "block_size": gate_up.block_size,
                "accuracy_level": INT8_ACTIVATIONS,
            },
            domain=MICROSOFT,
            name=node.name,
        )
        nodes.append(experts)
        replace_node(model, node, [tag(each, self.name) for each in nodes], experts.outputs)
        model.graph.opset_imports[MICROSOFT] = 1
        self.matches += 1


def _common_block(gate_up: QuantizedWeight, down: QuantizedWeight) -> int | None:
    """The largest block for both weights: the kernel wants one that divides both widths."""
    widths = (dims(gate_up.codes)[-1], dims(down.codes)[-1])
    sizes = [block_size(each, divides=widths) for each in (gate_up, down)]
    return min((size for size in sizes if size is not None), default=None) if None not in sizes else None
