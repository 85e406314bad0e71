"""The lowering that the command line asks for: of TensorRT, of ONNX Runtime on CUDA, or none to choose."""

from __future__ import annotations

from typing import TypeAlias

from qwenforge import ort_cuda_choice, tensorrt_choice
from qwenforge.ort_cuda_choice import ORT_CUDA, OrtCudaChoice
from qwenforge.tensorrt_choice import Operator, TensorRTChoice, WeightsAs

LoweringChoice: TypeAlias = TensorRTChoice | OrtCudaChoice


def choose(
    target: str,
    *,
    device: str | None = None,
    version: str | None = None,
    attention: Operator | None = None,
    experts: Operator | None = None,
    weights_as: WeightsAs | None = None,
) -> LoweringChoice | None:
    """The lowering for ``target``, None where there is nothing to choose; the arguments are those of both choices.

    Raises:
        UserError: an argument is missing, or belongs to another target.
        UnsupportedError: the device or the version cannot do what is asked for.
    """
    if target == ORT_CUDA:
        ort_cuda_choice.refuse_tensorrt_flags(tensorrt=version, weights_as=weights_as)
        return ort_cuda_choice.choose(device=device, attention=attention, experts=experts)
    return tensorrt_choice.choose(
        target, device=device, version=version, attention=attention, experts=experts, weights_as=weights_as
    )
