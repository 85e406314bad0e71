"""Key/value caches in fp32 -> in fp16, where every attention is ``qwenforge.cpu::CachedAttention``.

Half the bytes, where decoding waits for memory. The op computes in fp32 from either.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.infra import FusionPass
from qwenforge.graph_passes.lower.cpu_ops import ATTENTION

_PAST_PLACES = (3, 4)
_PRESENT_PLACES = (1, 2)


class HalfCaches(FusionPass):
    """Make every cache of the graph one of fp16; none where anything else reads or writes one."""

    name: ClassVar[str] = "cpu_half_caches"

    def run(self, model: ir.Model) -> None:
        pasts = [value for value in model.graph.inputs if str(value.name).startswith("past_key_values.")]
        presents = [value for value in model.graph.outputs if str(value.name).startswith("present.")]
        for past in pasts:
            for node, place in past.uses():
                if not _is_ours(node) or place not in _PAST_PLACES:
                    self.fail(f"{past.name} is not read by our attention", node)
                    return
        for present in presents:
            maker = present.producer()
            if not _is_ours(maker) or present.index() not in _PRESENT_PLACES or present.uses():
                self.fail(f"{present.name} is not written by our attention alone", maker)
                return
        for value in (*pasts, *presents):
            value.type = ir.TensorType(ir.DataType.FLOAT16)  # a copy of the model may share the old one
            self.matches += 1


def _is_ours(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == ATTENTION and node.domain == names.CPU_DOMAIN
