"""``qwenforge::MixtureOfExperts`` -> ``com.microsoft::MoE``: SwiGLU fused, gate and up rows interleaved.

The kernel takes the router's logits, computes their softmax over all experts and keeps the probabilities as they are
unless ``normalize_routing_weights`` is set, which is Qwen2-MoE exactly. Of experts with equal logits at the border of
the top k it keeps the last ones, where ``TopK`` keeps the first and ``torch.topk`` (transformers) none in particular.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.exporter import weights
from qwenforge.graph_passes.functions import MIXTURE_OF_EXPERTS
from qwenforge.graph_passes.infra import FusionPass, add_initializer, replace_node, tag


class LowerMixtureOfExperts(FusionPass):
    """Replace every expert function."""

    name: ClassVar[str] = "ort_moe"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.op_type != MIXTURE_OF_EXPERTS or node.domain != names.DOMAIN:
                continue
            x, logits, gate_up, down = node.inputs
            if gate_up is None or down is None or gate_up.const_value is None or down.const_value is None:
                self.fail("the expert weights are not initializers", node)
                continue
            if x is None or logits is None or x.dtype != logits.dtype:
                # A cast to fp16 could choose other experts.
                self.fail("the router's logits are of another dtype than the tokens", node)
                continue
            interleaved = weights.interleave_rows(gate_up.const_value)
            first = add_initializer(model, f"{gate_up.name}.interleaved", interleaved)
            moe = ir.node(
                "MoE",
                [x, logits, first, None, down],
                {
                    "k": node.attributes["top_k"].as_int(),
                    "normalize_routing_weights": node.attributes["normalize_topk"].as_int(),
                    "activation_type": "swiglu",
                    "swiglu_fusion": 1,
                    "activation_alpha": 1.0,
                    "activation_beta": 0.0,
                },
                domain="com.microsoft",
                name=node.name,
            )
            replace_node(model, node, [tag(moe, self.name)], moe.outputs)
            model.graph.opset_imports["com.microsoft"] = 1
            self.matches += 1
