"""Lowerings of the portable form to a target's own operators, one target family a file.

``lowering_rules`` gives a target's rules; ``lower`` applies them to an export.
"""

from __future__ import annotations

import onnx_ir as ir

from qwenforge.errors import UnsupportedError
from qwenforge.graph_passes.infra import FusionPass
from qwenforge.graph_passes.lower.ort_quantized_linear import Form
from qwenforge.lowering_choice import LoweringChoice
from qwenforge.ort_cuda_choice import ORT_CUDA, OrtCudaChoice
from qwenforge.tensorrt_choice import TensorRTChoice


def lowering_rules(
    target: str,
    *,
    weights: str = "copy",
    choice: LoweringChoice | None = None,
    capacity: int | None = None,
    products: Form = "static",
    own_ops: bool = False,
    half_caches: bool = False,
) -> list[FusionPass]:
    """The rules that follow the portable ones for ``target``, in order; for ``portable``, explicit quantization.

    Args:
        target: one of ``qwenforge.targets``.
        weights: ``link`` leaves every weight matrix as the checkpoint stores it, so that its bytes can be referred to.
        choice: how to lower for TensorRT, needed for its targets, or for ONNX Runtime on CUDA (by default as
            ``ort_cuda_choice.choose``).
        capacity: the static cache capacity for TensorRT; None leaves it symbolic.
        products: the form of products by quantized matrices for ``ort-cpu`` (:mod:`.ort_quantized_linear`).
        own_ops: for ``ort-cpu``, the ops of libqwenforge_cpu.so where they can (:mod:`.cpu_ops`).
        half_caches: with ``own_ops``, key/value caches in fp16 (:mod:`.cpu_caches`).

    Raises:
        UnsupportedError: there is no lowering for ``target``.
    """
    if target == "portable":
        from qwenforge.graph_passes.lower.explicit_quantization import ExplicitDequantize, ExplicitExperts

        return [ExplicitDequantize(), ExplicitExperts()]
    if target == "ort-cpu":
        from qwenforge.graph_passes.lower.cpu_ops import cpu_op_rules
        from qwenforge.graph_passes.lower.ort_cpu import ort_cpu_rules

        rules = ort_cpu_rules(weights=weights, products=products)
        return [*rules, *cpu_op_rules(half_caches=half_caches)] if own_ops else rules
    if target == ORT_CUDA:
        from qwenforge.graph_passes.lower.ort_cuda import ort_cuda_rules
        from qwenforge.ort_cuda_choice import choose

        return ort_cuda_rules(choice if isinstance(choice, OrtCudaChoice) else choose())
    if isinstance(choice, TensorRTChoice) and choice.target == target:
        from qwenforge.graph_passes.lower.tensorrt import tensorrt_rules

        return tensorrt_rules(choice, capacity=capacity)
    from qwenforge import targets

    targets.get(target)
    raise UnsupportedError(f"the lowering for target {target} needs a device; give --device.")


def lower(
    model: ir.Model,
    target: str,
    *,
    weights: str = "copy",
    choice: LoweringChoice | None = None,
    capacity: int | None = None,
    products: Form = "static",
    own_ops: bool = False,
    half_caches: bool = False,
) -> ir.Model:
    """Lower a portable model in place and return it; dead nodes, functions and initializers are dropped.

    The arguments are those of :func:`lowering_rules`.
    """
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

    rules = lowering_rules(
        target,
        weights=weights,
        choice=choice,
        capacity=capacity,
        products=products,
        own_ops=own_ops,
        half_caches=half_caches,
    )
    for rule in rules:
        rule(model)
        RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return model
