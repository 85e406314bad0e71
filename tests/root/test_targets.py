"""Targets: what is supported, what is refused and why."""

from __future__ import annotations

import pytest

from qwenforge import devices, targets
from qwenforge.errors import UnsupportedError


def test_default_dtype_is_the_first_supported_one() -> None:
    assert targets.resolve_dtype("ort-cpu", None) == "fp32"
    assert targets.resolve_dtype("portable", None) == "fp32"


@pytest.mark.parametrize(
    ("target", "dtype"),
    [(target.name, dtype) for target in targets.TARGETS.values() for dtype in target.dtypes],
)
def test_supported_dtype_is_taken_as_asked(target: str, dtype: str) -> None:
    assert targets.resolve_dtype(target, dtype) == dtype


def test_bf16_on_ort_cpu_is_refused_with_alternatives() -> None:
    with pytest.raises(UnsupportedError, match=r"bf16.*bfloat16 kernels.*fp32.*fp16.*portable"):
        targets.resolve_dtype("ort-cpu", "bf16")


def test_fp32_on_a_gpu_is_refused_with_alternatives() -> None:
    with pytest.raises(UnsupportedError, match=r"ort-cuda .*fp32: .*16 bits.*bf16.*fp16.*--target ort-cpu"):
        targets.resolve_dtype("ort-cuda", "fp32")
    assert targets.resolve_dtype("ort-cuda", None) == "bf16"


@pytest.mark.parametrize("target", targets.TARGETS.values(), ids=lambda target: target.name)
def test_every_dtype_is_supported_or_refused_with_a_reason(target: targets.Target) -> None:
    assert set(target.dtypes) | set(target.refused) == set(targets.DTYPES)
    assert all("choose " in reason for reason in target.refused.values())
    assert not set(target.dtypes) & set(target.refused)


def test_unknown_target_lists_the_known_ones() -> None:
    known = "ort-cpu or ort-cuda or tensorrt or tensorrt-rtx or portable"
    with pytest.raises(UnsupportedError, match=rf"unknown target 'gpu'; use {known}"):
        targets.resolve_dtype("gpu", None)


def test_unknown_dtype_lists_what_the_target_supports() -> None:
    with pytest.raises(UnsupportedError, match=r"int3.*choose fp32 or fp16"):
        targets.resolve_dtype("ort-cpu", "int3")


@pytest.mark.parametrize(
    ("device", "dtype", "alternatives"),
    [
        ("jetson-orin-nano", "fp8", r"jetson-orin-nano .*no FP8.*int8.*int4"),
        ("a100", "fp8", r"a100 .*no FP8.*int8.*int4"),
        ("h200", "fp8", r"quantize with --quantize .*choose bf16 or fp16"),
        (None, "int4", r"quantize with --quantize .*choose bf16 or fp16"),
    ],
)
def test_quantized_dtype_is_refused_with_what_the_device_offers(
    device: str | None, dtype: str, alternatives: str
) -> None:
    with pytest.raises(UnsupportedError, match=alternatives):
        targets.resolve_dtype("tensorrt", dtype, None if device is None else devices.get_device(device))
