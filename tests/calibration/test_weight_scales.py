"""Scales of weights against PyTorch's fake quantization and a search by brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwenforge.calibration.ranges import Format
from qwenforge.calibration.weight_scales import (
    CLIPPING_SHARES,
    clipped_scales,
    fake_quantized,
    group_scales,
    tensor_scales,
)


def _weight(rows: int = 12, columns: int = 100) -> np.ndarray:
    return (np.random.default_rng(1).standard_t(4, (rows, columns))).astype(np.float32)


@pytest.mark.parametrize(("number_format", "group"), [("int8", 100), ("int4", 32), ("int4", 64), ("fp8", 100)])
def test_scales_of_groups_map_the_largest_to_the_largest_code(number_format: Format, group: int) -> None:
    """Those of integers up to float16's rounding (exporter/scale_rounding.py), half a unit of its last place."""
    weight, rounding = _weight(), 1e-6 if number_format == "fp8" else 2.0**-11
    weight[3] = 0
    scales = group_scales(weight, number_format, group)
    top = {"int8": 127, "int4": 7, "fp8": 448}[number_format]
    assert scales.shape == (12, -(-100 // group)) and scales.dtype == np.float32
    for row in range(12):
        for index in range(scales.shape[1]):
            largest = np.abs(weight[row, index * group : (index + 1) * group]).max()
            assert scales[row, index] == pytest.approx(largest / top if largest else 1.0, rel=rounding)


def test_fake_quantized_int8_rows_are_pytorch_s() -> None:
    weight = _weight()
    scales = group_scales(weight, "int8", 100)
    expected = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(weight), torch.from_numpy(scales[:, 0]), torch.zeros(12, dtype=torch.int32), 0, -127, 127
    )
    np.testing.assert_allclose(fake_quantized(weight, scales, "int8", 100), expected.numpy(), atol=1e-6)


def test_fp8_matrix_has_one_scale() -> None:
    weight = _weight()
    scales = tensor_scales(weight, "fp8")
    assert scales.shape == (12, 1)
    np.testing.assert_allclose(scales, np.abs(weight).max() / 448, rtol=1e-6)


def test_clipping_finds_what_brute_force_finds() -> None:
    weight, group = _weight(), 32
    importance = np.random.default_rng(2).uniform(0.01, 4, 100)
    found = clipped_scales(weight, importance, "int4", group)
    clipped = 0
    for row in range(12):
        for index in range(4):
            part = slice(index * group, min((index + 1) * group, 100))
            values, moments = weight[row, part].astype(np.float64), importance[part]
            errors = []
            for share in CLIPPING_SHARES:
                scale = float(np.float16(np.abs(values).max() * share / 7))  # as what is found
                codes = np.clip(np.rint(values / scale), -8, 7)
                errors.append((moments * (codes * scale - values) ** 2).sum())
            scale = float(found[row, index])
            codes = np.clip(np.rint(values / scale), -8, 7)
            assert (moments * (codes * scale - values) ** 2).sum() <= min(errors) * (1 + 1e-4)
            clipped += scale < 0.99 * np.abs(values).max() / 7
    assert clipped > 10
