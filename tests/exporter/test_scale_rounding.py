"""Scales that float16 holds: which are rounded, how far, and that weights are quantized with what is stored."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.calibration.weight_scales import clipped_scales, group_scales, tensor_scales
from qwenforge.exporter.block_codes import in_blocks, rounded
from qwenforge.exporter.scale_rounding import half_scales
from support.small_graphs import Array, normal

SMALLEST, LARGEST = np.float32(2.0**-14), np.float32(65504)


def is_half(values: Array) -> bool:
    return bool((values.astype(np.float16).astype(np.float32) == values).all())


def test_scales_become_the_nearest_number_of_float16() -> None:
    """Over its whole range, by at most half a unit in the last place: 2^-11 of the scale."""
    scales = np.exp2(np.random.default_rng(0).uniform(-14, 15.99, (50, 40))).astype(np.float32)
    found = half_scales(scales)
    assert found.dtype == np.float32 and found.shape == scales.shape and is_half(found)
    wide = scales.astype(np.float64)
    assert 2.0**-12 < (np.abs(found - wide) / wide).max() <= 2.0**-11
    neighbours = [np.nextafter(found.astype(np.float16), np.float16(to)).astype(np.float64) for to in (0, np.inf)]
    for other in neighbours:
        assert (np.abs(found - wide) <= np.abs(other - wide)).all()


def test_scales_of_float16_stay_bit_by_bit() -> None:
    normals = np.arange(0x0400, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(half_scales(normals), normals)


@pytest.mark.parametrize(
    "scale", [0.0, 1e-8, 1e-30, np.nextafter(SMALLEST, np.float32(0)), np.nextafter(LARGEST, np.float32(1e6)), 1e9]
)
def test_what_float16_would_lose_stays(scale: float) -> None:
    """Subnormal numbers would be coarser, greater ones infinite; the others beside them are rounded."""
    found = half_scales(np.array([scale, 0.1, LARGEST, SMALLEST], np.float32))
    assert found[0] == np.float32(scale)
    assert found[1] == np.float32(np.float16(0.1)) and found[2] == LARGEST and found[3] == SMALLEST


@pytest.mark.parametrize("number_format", ["int4", "int8"])
def test_calibrated_scales_of_integers_are_of_float16(number_format: str) -> None:
    weight = normal(24, 64, scale=0.03)
    squares = np.ones(64, np.float32)
    for scales in (
        group_scales(weight, number_format, 16),  # type: ignore[arg-type]
        tensor_scales(weight, number_format),  # type: ignore[arg-type]
        clipped_scales(weight, squares, number_format, 16),  # type: ignore[arg-type]
    ):
        assert is_half(scales)
    exact = np.abs(weight.reshape(24, 4, 16)).max(-1) / {"int4": 7, "int8": 127}[number_format]
    np.testing.assert_allclose(group_scales(weight, number_format, 16), exact, rtol=2.0**-11)  # type: ignore[arg-type]


def test_calibrated_scales_of_float8_are_not_rounded() -> None:
    weight = normal(24, 64, scale=0.03)
    exact = np.abs(weight).max(-1, keepdims=True) / np.float32(448)
    np.testing.assert_allclose(group_scales(weight, "fp8", 64), exact, rtol=1e-7)
    assert not is_half(group_scales(weight, "fp8", 64))


@pytest.mark.parametrize(("weight_format", "largest"), [("int4", 7), ("int8", 127)])
def test_codes_are_computed_with_the_rounded_scale(weight_format: str, largest: int) -> None:
    """What is stored is nearest to the weight for the scale that is stored, not for the one before rounding."""
    weight = normal(16, 96, scale=0.05)
    found = rounded(ir.tensor(weight), weight_format, 32)  # type: ignore[arg-type]
    scales = np.asarray(found.scales.numpy())
    assert is_half(scales)
    np.testing.assert_allclose(scales, np.abs(weight.reshape(16, 3, 32)).max(-1) / largest, rtol=2.0**-11)
    codes = found.codes.numpy().astype(np.int32)
    spread = scales.repeat(32, 1).astype(np.float64)
    expected = np.clip(np.rint(weight / spread), -largest - 1, largest)
    np.testing.assert_array_equal(codes, expected)
    assert np.abs(found.dequantized().numpy() - weight).max() <= 0.5 * scales.max() * (1 + 2.0**-10)


def test_blocks_keep_the_rounded_scales() -> None:
    found = rounded(ir.tensor(normal(16, 96, scale=0.05)), "int4", 32)
    assert is_half(np.asarray(in_blocks(found, 16).scales.numpy()))
