"""The places a graph can be exported for, and the precisions each one supports.

A precision or a target that is refused says why and what to choose instead; nothing is substituted silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qwenforge.devices import Device
from qwenforge.errors import UnsupportedError
from qwenforge.recipe_names import RECIPE_PRECISIONS

DTYPES = ("fp32", "fp16", "bf16")
"""Precisions of weights and activations that an export can be asked for."""

QUANTIZED = ("fp8", "int8", "int4")
"""Precisions that are known and refused by name: a device that lacks one says so."""


@dataclass(frozen=True)
class Target:
    """One export target.

    Attributes:
        name: as given to ``--target``.
        summary: one line on what the graph is made of and who runs it.
        dtypes: supported precisions, the default first.
        refused: a reason, ending in what to do, for each precision that is not supported.
    """

    name: str
    summary: str
    dtypes: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


_SIXTEEN_BITS = (
    "engines compute in 16 bits, with fp32 inside norms, softmax and sums, and give fp32 logits; choose bf16 (what "
    "Qwen's checkpoints are stored in) or fp16"
)
_TARGETS = (
    Target(
        name="ort-cpu",
        summary="ONNX Runtime on a CPU: fused com.microsoft operators, key/value cache written in place",
        dtypes=("fp32", "fp16"),
        refused={
            "bf16": "ONNX Runtime has no bfloat16 kernels for these operators on a CPU; choose fp32 (it loses nothing "
            "of a bf16 checkpoint) or fp16, or --target portable"
        },
    ),
    Target(
        name="ort-cuda",
        summary="ONNX Runtime on an NVIDIA GPU: com.microsoft operators and our custom ops, key/value cache in place",
        dtypes=("bf16", "fp16"),
        refused={
            "fp32": "GroupQueryAttention and our custom ops compute in 16 bits on a GPU, with fp32 inside norms, "
            "softmax and sums, and give fp32 logits; choose bf16 (what Qwen's checkpoints are stored in) or fp16, or "
            "--target ort-cpu"
        },
    ),
    Target(
        name="tensorrt",
        summary="TensorRT on an NVIDIA GPU: strongly typed, key/value cache in place, experts in our plugin",
        dtypes=("bf16", "fp16"),
        refused={"fp32": _SIXTEEN_BITS},
    ),
    Target(
        name="tensorrt-rtx",
        summary="TensorRT for RTX: the same, built ahead of time on a machine without a GPU",
        dtypes=("bf16", "fp16"),
        refused={"fp32": _SIXTEEN_BITS},
    ),
    Target(
        name="portable",
        summary="standard ONNX (opset 24) and two functions with standard bodies: any complete ONNX runtime",
        dtypes=("fp32", "fp16", "bf16"),
    ),
)

TARGETS: Mapping[str, Target] = MappingProxyType({target.name: target for target in _TARGETS})
"""Every target that can be exported for, by name."""


def available() -> tuple[str, ...]:
    """Names of the targets that can be exported for."""
    return tuple(TARGETS)


def get(name: str) -> Target:
    """The target called ``name``.

    Raises:
        UnsupportedError: there is none.
    """
    if name in TARGETS:
        return TARGETS[name]
    raise UnsupportedError(f"unknown target {name!r}; use {' or '.join(TARGETS)}.")


def resolve_dtype(target: str, dtype: str | None, device: Device | None = None) -> str:
    """The precision to export in: ``dtype`` if ``target`` supports it, its default when ``dtype`` is None.

    Raises:
        UnsupportedError: the target is not available, or it or ``device`` refuses the precision; the message gives the
            alternatives.
    """
    chosen = get(target)
    if dtype is None:
        return chosen.dtypes[0]
    if dtype in chosen.dtypes:
        return dtype
    if dtype in QUANTIZED:
        if device is not None:
            device.require_precision(dtype)
        recipes = [name for name, precision in RECIPE_PRECISIONS.items() if precision == dtype]
        raise UnsupportedError(
            f"--dtype {dtype} is none of activations; quantize with --quantize {' or '.join(recipes)}, and "
            f"choose {' or '.join(chosen.dtypes)} for --dtype."
        )
    reason = chosen.refused.get(dtype, f"it is none of {', '.join(DTYPES)}; choose {' or '.join(chosen.dtypes)}")
    raise UnsupportedError(f"target {target} does not support dtype {dtype}: {reason}.")
