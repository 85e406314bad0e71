"""Packed codes as steps of a plan, against plugins/moe/packing.py, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.exporter.packing import AsBytes, PackInt4, PackInt8
from qwenforge.exporter.weights import DerivedTensor
from qwenforge.plugins.moe.packing import pack_int4_values, pack_int8_values

RANDOM = np.random.default_rng(3)


@pytest.mark.parametrize("shape", [(16, 64), (3, 24, 128)])
def test_int8_is_packed_as_the_plugin_packs(shape: tuple[int, ...]) -> None:
    codes = RANDOM.integers(-128, 128, shape).astype(np.int8)
    packed = DerivedTensor(PackInt8(), [ir.tensor(codes)])
    assert packed.dtype == ir.DataType.INT8
    np.testing.assert_array_equal(packed.numpy(), pack_int8_values(codes))


@pytest.mark.parametrize("shape", [(16, 64), (3, 24, 128)])
def test_int4_is_packed_as_the_plugin_packs(shape: tuple[int, ...]) -> None:
    codes = RANDOM.integers(-8, 8, shape).astype(np.int8)
    packed = DerivedTensor(PackInt4(), [ir.tensor(codes.astype(ml_dtypes.int4), dtype=ir.DataType.INT4)])
    assert packed.shape.numpy() == (*shape[:-1], shape[-1] // 2)
    np.testing.assert_array_equal(packed.numpy(), pack_int4_values(codes))


def test_fp8_travels_as_its_bytes() -> None:
    numbers = RANDOM.normal(0, 40, (8, 64)).astype(ml_dtypes.float8_e4m3fn)
    found = DerivedTensor(AsBytes(), [ir.tensor(numbers, dtype=ir.DataType.FLOAT8E4M3FN)]).numpy()
    np.testing.assert_array_equal(found, numbers.view(np.int8))


@pytest.mark.parametrize(("transform", "columns"), [(PackInt8(), 24), (PackInt4(), 48)])
def test_part_of_a_block_is_refused(transform: PackInt8 | PackInt4, columns: int) -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        DerivedTensor(transform, [ir.tensor(np.zeros((8, columns), np.int8))])
