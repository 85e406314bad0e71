"""ONNX Runtime on a CPU: the rules in order.

Each replaces portable operators by ``com.microsoft`` ones that compute the same; weights stay lazy. A form that ONNX
Runtime's kernels refuse (a head size that is no multiple of 8, say) keeps its portable function, which runs from its
body.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.errors import UnsupportedError
from qwenforge.graph_passes.functions import QUANTIZED_ATTENTION, QUANTIZED_EXPERTS
from qwenforge.graph_passes.fuse.fold_weight_transforms import FoldWeightTransforms
from qwenforge.graph_passes.infra import FusionPass
from qwenforge.graph_passes.lower.ort_attention import LowerAttention
from qwenforge.graph_passes.lower.ort_linear import MatMulByStoredWeight, TiedVocabularyProjection
from qwenforge.graph_passes.lower.ort_moe import LowerMixtureOfExperts
from qwenforge.graph_passes.lower.ort_quantized_embedding import TiedQuantizedEmbedding
from qwenforge.graph_passes.lower.ort_quantized_linear import Form, LowerQuantizedLinear
from qwenforge.graph_passes.lower.ort_quantized_moe import LowerQuantizedExperts
from qwenforge.graph_passes.lower.ort_skip_norm import FuseResidualNorm
from qwenforge.graph_passes.lower.ort_swish import SwishToQuickGelu
from qwenforge.graph_passes.lower.qkv_packing import PackQKV
from qwenforge.graph_passes.lower.unmerge import UnmergeProjections, UnmergeQuantizedProjections


class FoldTableCasts(FoldWeightTransforms):
    """Fold the cast of the rotary tables in a 16-bit model; all other weights were folded for the portable form."""

    name: ClassVar[str] = "ort_table_casts"


class RefuseWithoutKernel(FusionPass):
    """Refuse the quantized functions: a cache of 8 bits and experts with FP8 tokens have no kernel here.

    Raises:
        UnsupportedError: the graph calls one of them.
    """

    name: ClassVar[str] = "ort_without_kernel"

    def run(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.domain == names.DOMAIN and node.op_type in _WITHOUT_KERNEL:
                raise UnsupportedError(
                    f"{node.name}: ort-cpu has no {_WITHOUT_KERNEL[node.op_type]}; leave it out of the recipe, or "
                    "choose another target."
                )


_WITHOUT_KERNEL = {QUANTIZED_ATTENTION: "8-bit key/value cache", QUANTIZED_EXPERTS: "experts with FP8 tokens"}


def ort_cpu_rules(*, weights: str = "copy", products: Form = "static") -> list[FusionPass]:
    """The lowering.

    Args:
        weights: with ``link`` no weight matrix is merged or transposed.
        products: the form of products by quantized matrices (:mod:`.ort_quantized_linear`).
    """
    # Measured at Qwen2-0.5B in fp32 on 2 threads (two loads of one model differ by 3 % there). A tied or a transposed
    # vocabulary projection, gate and up merged or not: no difference to be seen, so the smaller file and the portable
    # form's merged product stay. Prepacking is worth its 500 MB: without it the first token takes 1.2 to 1.5 times as
    # long; linked weights go without, by a session option of their bundle, to stay mapped.
    linked = weights == "link"
    # Quantized products are so fast that the Split behind a merged one shows: 5 % of a prompt's time.
    quantized: list[FusionPass] = [
        TiedQuantizedEmbedding(),
        UnmergeQuantizedProjections(),
        LowerQuantizedLinear(products),
        LowerQuantizedExperts(),
    ]
    layout: list[FusionPass] = [PackQKV(), *quantized, TiedVocabularyProjection()]
    if linked:
        layout = [UnmergeProjections(), *quantized, MatMulByStoredWeight()]
    return [
        RefuseWithoutKernel(),
        FoldTableCasts(),
        LowerAttention(),
        *layout,
        LowerMixtureOfExperts(),
        FuseResidualNorm(),
        SwishToQuickGelu(),
    ]
