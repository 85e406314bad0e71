"""Quantized weights in a plan: codes against PyTorch and float64, found again behind joins, streamed and refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qwenforge.errors import UserError
from qwenforge.exporter import weights
from qwenforge.exporter.quantized_weights import QuantizedWeight, WeightFormat, as_quantized, quantize
from qwenforge.exporter.weights import chunks, dims

LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
FORMATS: list[WeightFormat] = ["int8", "int4", "fp8"]


def matrix(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scales_of(array: np.ndarray[Any, Any], weight_format: WeightFormat, group_size: int) -> np.ndarray[Any, Any]:
    starts = range(0, array.shape[-1], group_size)
    groups = [np.abs(array[..., start : start + group_size]).max(-1) for start in starts]
    return (np.stack(groups, -1) / LARGEST[weight_format]).astype(np.float32)


def quantized(array: np.ndarray[Any, Any], weight_format: WeightFormat, group_size: int) -> QuantizedWeight:
    scales = ir.tensor(scales_of(array, weight_format, group_size))
    return quantize(ir.tensor(array, name="w"), weight_format, scales, group_size=group_size)


@pytest.mark.parametrize("group_size", [16, 40, 96])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_values_are_those_of_torch(weight_format: WeightFormat, group_size: int) -> None:
    import torch

    array = matrix(24, 96)
    scales = torch.from_numpy(scales_of(array, weight_format, group_size).repeat(group_size, 1)[:, :96])
    scaled = torch.from_numpy(array) / scales
    if weight_format == "fp8":
        codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    else:
        low, high = (-127, 127) if weight_format == "int8" else (-8, 7)
        codes = scaled.round().clamp(low, high)
    found = quantized(array, weight_format, group_size)
    assert np.array_equal(found.codes.numpy().astype(np.float32), codes.numpy())
    assert np.array_equal(found.dequantized().numpy(), (codes * scales).numpy())


def test_zero_points_shift_codes() -> None:
    array = np.abs(matrix(8, 32))
    scales = (array.max(-1, keepdims=True) / 15).astype(np.float32)
    points = np.full((8, 1), 3, ml_dtypes.uint4)
    found = quantize(
        ir.tensor(array),
        "uint4",
        ir.tensor(scales),
        group_size=32,
        zero_points=ir.tensor(points, dtype=ir.DataType.UINT4),
    )
    expected = np.clip(np.rint(array.astype(np.float64) / scales) + 3, 0, 15)
    assert np.array_equal(found.codes.numpy().astype(np.float64), expected)
    assert np.allclose(found.dequantized().numpy(), (expected - 3) * scales, rtol=1e-6)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_codes_survive_every_join_of_rows(weight_format: WeightFormat) -> None:
    """Merged projections, stacked experts, interleaved rows, slices, casts and a transpose there and back."""
    first, second = quantized(matrix(16, 32), weight_format, 16), quantized(matrix(16, 32, seed=1), weight_format, 16)
    parts = [part.dequantized(ir.DataType.BFLOAT16) for part in (first, second)]
    merged = weights.transpose(weights.concat(parts, 0), (1, 0))
    stacked = weights.stack([weights.interleave_rows(weights.concat(parts, 0), 8)] * 2)
    cut = weights.slice_(weights.concat(parts, 0), 0, 8, 20)
    for plan in (weights.transpose(merged, (1, 0)), stacked, cut):
        found = as_quantized(plan)
        assert found is not None and found.format == weight_format and found.group_size == 16
        assert np.array_equal(found.dequantized(ir.DataType.BFLOAT16).numpy(), plan.numpy())


def test_mixed_formats_are_not_one_quantized_weight() -> None:
    first, second = quantized(matrix(16, 32), "int8", 32), quantized(matrix(16, 32), "int8", 16)
    assert as_quantized(weights.concat([first.dequantized(), second.dequantized()], 0)) is None
    assert as_quantized(weights.concat([first.dequantized(), ir.tensor(matrix(16, 32))], 0)) is None
    assert as_quantized(weights.concat([first.dequantized(), first.dequantized()], 1)) is None
    assert as_quantized(weights.transpose(first.dequantized(), (1, 0))) is None
    assert as_quantized(ir.tensor(matrix(16, 32))) is None


def test_int4_is_stored_as_onnx_stores_it() -> None:
    found = quantized(matrix(6, 32), "int4", 32)
    raw = b"".join(chunks(found.codes))
    proto = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=[6, 32], raw_data=raw)
    assert len(raw) == found.codes.nbytes == 96
    assert np.array_equal(onnx.numpy_helper.to_array(proto).astype(np.int8), found.codes.numpy().astype(np.int8))


def test_large_matrices_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1024)
    array = matrix(64, 48)
    found = quantized(array, "int8", 48)
    pieces = list(chunks(found.codes))
    assert len(pieces) > 8
    whole = np.frombuffer(b"".join(pieces), np.int8).reshape(64, 48)
    assert np.array_equal(whole, np.clip(np.rint(array / found.scales.numpy()), -127, 127))


def test_multiply_broadcasts_rows_and_columns() -> None:
    array, rows, columns = matrix(6, 4), matrix(6, 1, seed=1), matrix(1, 4, seed=2)
    plan = weights.multiply(weights.multiply(ir.tensor(array), ir.tensor(rows)), ir.tensor(columns))
    assert np.array_equal(plan.numpy(), array * rows * columns)
    with pytest.raises(ValueError, match="cannot multiply"):
        weights.multiply(ir.tensor(array), ir.tensor(matrix(4)))


def test_weight_that_is_not_finite_is_refused() -> None:
    array = matrix(4, 16)
    scales = ir.tensor(scales_of(array, "int8", 16))
    array[2, 3] = np.nan
    plan = quantize(ir.tensor(array, name="layer.weight"), "int8", scales, group_size=16)
    with pytest.raises(UserError, match=r"'layer\.weight'.*not finite"):
        plan.codes.numpy()


def test_scales_must_fit_the_groups() -> None:
    codes = ir.tensor(np.zeros((4, 16), np.int8))
    with pytest.raises(ValueError, match="do not fit"):
        QuantizedWeight(codes, ir.tensor(np.ones((4, 3), np.float32)), None, 8)
    assert dims(QuantizedWeight(codes, ir.tensor(np.ones((4, 3), np.float32)), None, 7).scales) == (4, 3)
