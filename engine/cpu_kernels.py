"""Whose kernels compute an ort-cpu graph of quantized weights: those of our library, or ONNX Runtime's.

Ours are the default where the library is installed and finds an instruction set here that they are written for. ONNX
Runtime's run everywhere; what only they compute is left to them, and what has no quantized weights has no choice.
"""

from __future__ import annotations

from typing import Literal

from qwenforge.engine.cpu_library import LIBRARY, cpu_library, find_cpu_library
from qwenforge.errors import UnsupportedError
from qwenforge.manifest import CpuCache, Kernels, OrtCpuRecord

_WRITTEN_FOR = ("avx512-vnni", "avx2")


def choose_kernels(
    asked: Kernels | None,
    *,
    cache: Literal["fp32"] | None = None,
    target: str,
    dtype: str,
    weights: str = "copy",
    weight_only: bool,
) -> OrtCpuRecord | None:
    """Whose kernels an export is lowered to, and the type of its caches; None where there is nothing to choose.

    Args:
        asked: ``--kernels``; None for the default.
        cache: ``--cache``; None for the default, fp16 with our kernels and fp32 with ONNX Runtime's.
        target, dtype: what is exported.
        weights: ``link`` leaves them in the checkpoint's files.
        weight_only: weights are quantized, by the export or by the checkpoint, and activations are not.

    Raises:
        UnsupportedError: ``asked`` or ``cache`` for something that has no such choice.
        UserError: ours are asked for and the library is not to be had, or the one that is installed cannot be used.
    """
    record = _choose(asked, target=target, dtype=dtype, weights=weights, weight_only=weight_only)
    if record is not None and record.kernels == "qwenforge":
        chosen: CpuCache = cache or "fp16"
        return record.model_copy(update={"cache": chosen})
    if cache is not None:
        reason = "" if record is None else f", and this export has ONNX Runtime's ({record.basis})"
        raise UnsupportedError(
            f"--cache {cache} is for qwenforge's CPU kernels, whose caches are in fp16 otherwise{reason}; leave it out."
        )
    return record


def _choose(asked: Kernels | None, *, target: str, dtype: str, weights: str, weight_only: bool) -> OrtCpuRecord | None:
    """The choice of the kernels alone."""
    if target != "ort-cpu" or not weight_only:
        if asked is not None:
            raise UnsupportedError(
                "--kernels is for --target ort-cpu with quantized weights and unquantized activations: add --quantize "
                "int4-weight-only or int8-weight-only, or leave --kernels out."
            )
        return None
    unfit = _unfit(dtype, weights)
    if asked == "qwenforge":
        if unfit is not None:
            raise UnsupportedError(f"--kernels qwenforge does not go with {unfit}; leave one of the two out.")
        found = find_cpu_library(wanted_by="--kernels qwenforge asks for qwenforge's CPU kernels")
        return OrtCpuRecord(kernels="qwenforge", basis=f"asked for; {found.instruction_set} here")
    if asked == "onnxruntime":
        return OrtCpuRecord(kernels="onnxruntime", basis="asked for")
    if unfit is not None:
        return OrtCpuRecord(kernels="onnxruntime", basis=f"qwenforge's do not go with {unfit}")
    library = cpu_library()
    if library is None:
        basis = f"{LIBRARY} is not installed: there was no C++ compiler then"
        return OrtCpuRecord(kernels="onnxruntime", basis=basis)
    if library.instruction_set not in _WRITTEN_FOR:
        basis = f"qwenforge's are written for AVX-512 VNNI and AVX2, and {library.instruction_set} is all there is here"
        return OrtCpuRecord(kernels="onnxruntime", basis=basis)
    return OrtCpuRecord(kernels="qwenforge", basis=f"{library.instruction_set} here")


def _unfit(dtype: str, weights: str) -> str | None:
    """What of an export our kernels cannot do."""
    if dtype != "fp32":
        return f"--dtype {dtype}: they compute in fp32"
    if weights == "link":
        return "--weights link: they pack the weights"
    return None
