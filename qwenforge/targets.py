"""The places a graph can be exported for, and the precisions each one supports.

A precision or a target that is refused says why and what to choose instead; nothing is substituted silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qwenforge.errors import UnsupportedError

DTYPES = ("fp32", "fp16", "bf16")
"""Precisions of weights and activations that an export can be asked for."""


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
        name="portable",
        summary="standard ONNX (opset 24) and two functions with standard bodies: any complete ONNX runtime",
        dtypes=("fp32", "fp16", "bf16"),
    ),
)

TARGETS: Mapping[str, Target] = MappingProxyType({target.name: target for target in _TARGETS})
"""Every target that can be exported for, by name."""

PLANNED: Mapping[str, str] = MappingProxyType(
    {
        "ort-cuda": "ONNX Runtime on an NVIDIA GPU",
        "tensorrt": "TensorRT on an NVIDIA GPU",
        "tensorrt-rtx": "TensorRT for RTX, built ahead of time",
    }
)
"""Targets of the design that are not built yet; asking for one is refused by name."""


def available() -> tuple[str, ...]:
    """Names of the targets that can be exported for."""
    return tuple(TARGETS)


def get(name: str) -> Target:
    """The target called ``name``.

    Raises:
        UnsupportedError: it is planned but not built yet, or unknown.
    """
    if name in TARGETS:
        return TARGETS[name]
    choices = " or ".join(TARGETS)
    if name in PLANNED:
        raise UnsupportedError(f"target {name} ({PLANNED[name]}) is not built yet; use {choices}.")
    raise UnsupportedError(f"unknown target {name!r}; use {choices}.")


def resolve_dtype(target: str, dtype: str | None) -> str:
    """The precision to export in: ``dtype`` if ``target`` supports it, its default when ``dtype`` is None.

    Raises:
        UnsupportedError: the target is not available or refuses the precision; the message gives the alternatives.
    """
    chosen = get(target)
    if dtype is None:
        return chosen.dtypes[0]
    if dtype in chosen.dtypes:
        return dtype
    reason = chosen.refused.get(dtype, f"it is none of {', '.join(DTYPES)}; choose {' or '.join(chosen.dtypes)}")
    raise UnsupportedError(f"target {target} does not support dtype {dtype}: {reason}.")
