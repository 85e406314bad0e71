"""ONNX Runtime on an NVIDIA GPU: the rules in order, by :class:`~qwenforge.ort_cuda_choice.OrtCudaChoice`.

The graph is ort-cpu's but for attention and experts where our custom ops compute them. What ONNX Runtime's own CUDA
kernels are like was read in its sources:

* ``GroupQueryAttention`` takes fp16 and bf16, heads whose size is a multiple of 8, and rotates those whose size is a
  multiple of 16; several new tokens against part-filled caches are refused for more than one row, as on the CPU.
  ``seqlens_k`` is read on the device, ``total_sequence_length`` on the host. Past and present share a buffer when they
  are bound to one.
* ``MoE`` softmaxes the logits over all experts and scales the chosen ones only if ``normalize_routing_weights`` is set,
  as Qwen2-MoE wants it. No result of it has been seen here: its kernels need a GPU.
* ``RMSNormalization`` of opset 23 has fp16 and bf16 kernels in 1.31, the oldest release taken: no older form of it is
  needed.
"""

from __future__ import annotations

from qwenforge.graph_passes.infra import FusionPass
from qwenforge.graph_passes.lower.ort_attention import LowerAttention
from qwenforge.graph_passes.lower.ort_cpu import FoldTableCasts
from qwenforge.graph_passes.lower.ort_cuda_kernels import ReportMissingKernels
from qwenforge.graph_passes.lower.ort_cuda_ops import CustomAttention, CustomExperts, FoldHeadNorms, PackCustomQKV
from qwenforge.graph_passes.lower.ort_cuda_quantized import CudaQuantizedLinear, RequireCustomOps
from qwenforge.graph_passes.lower.ort_linear import TiedVocabularyProjection
from qwenforge.graph_passes.lower.ort_moe import LowerMixtureOfExperts
from qwenforge.graph_passes.lower.ort_skip_norm import FuseResidualNorm
from qwenforge.graph_passes.lower.ort_swish import SwishToQuickGelu
from qwenforge.graph_passes.lower.qkv_packing import PackQKV
from qwenforge.ort_cuda_choice import OrtCudaChoice


def ort_cuda_rules(choice: OrtCudaChoice) -> list[FusionPass]:
    """The lowering of ``choice``."""
    attention: list[FusionPass] = [LowerAttention(), PackQKV()]
    if choice.attention == "plugin":
        attention = [CustomAttention(), FoldHeadNorms(), PackCustomQKV()]
    experts: list[FusionPass] = [RequireCustomOps(), LowerMixtureOfExperts()]
    if choice.experts == "plugin":
        experts = [CustomExperts(), RequireCustomOps()]
    return [
        FoldTableCasts(),
        *attention,
        TiedVocabularyProjection(),
        *experts,
        CudaQuantizedLinear(),
        FuseResidualNorm(),
        SwishToQuickGelu(),
        ReportMissingKernels(),
    ]
