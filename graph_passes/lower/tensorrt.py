"""TensorRT: the rules in order, by :class:`~qwenforge.tensorrt_choice.TensorRTChoice`.

Networks are strongly typed: every precision is in the graph, nothing is left to builder flags. For TensorRT 11 and RTX
the graph keeps opset 24 and TensorRT's own operators; for TensorRT 10 it is brought down to opset 20, which version
10.3's parser knows, and everything newer becomes plugins and plain operators.
"""

from __future__ import annotations

from qwenforge.graph_passes.infra import FusionPass
from qwenforge.graph_passes.lower.explicit_quantization import TensorRTDequantize
from qwenforge.graph_passes.lower.ort_cpu import FoldTableCasts
from qwenforge.graph_passes.lower.tensorrt_attention import NativeAttention, PluginAttention
from qwenforge.graph_passes.lower.tensorrt_int4_blocks import Int4Blocks
from qwenforge.graph_passes.lower.tensorrt_moe import NativeExperts, PluginExperts
from qwenforge.graph_passes.lower.tensorrt_opset import ExpandRMSNorm, ExpandSwish, LowerOpset
from qwenforge.graph_passes.lower.tensorrt_signature import StaticCapacity
from qwenforge.graph_passes.lower.tensorrt_tied import TransposeTiedVocabulary
from qwenforge.tensorrt_choice import TensorRTChoice


def tensorrt_rules(choice: TensorRTChoice, *, capacity: int | None = None) -> list[FusionPass]:
    """The lowering of ``choice``; ``capacity``: the static size of the caches, None to leave them symbolic."""
    rules: list[FusionPass] = [FoldTableCasts(), TransposeTiedVocabulary()]
    rules.append(PluginExperts() if choice.experts == "plugin" else NativeExperts())
    if choice.attention == "native":
        rules.append(NativeAttention())
    rules.append(PluginAttention())  # after the native rule: what that leaves (a sliding window)
    rules += [Int4Blocks(), TensorRTDequantize(choice.device), ExpandSwish()]
    if not choice.modern_parser:
        rules += [ExpandRMSNorm(), LowerOpset()]
    if capacity is not None:
        rules.append(StaticCapacity(capacity))
    return rules
