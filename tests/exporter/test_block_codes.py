"""Block codes, decoded here by the kernels' documented layout, against the quantized matrix they are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import BlockWeight, block_size, in_blocks, rounded
from qwenforge.exporter.quantized_weights import QuantizedWeight, WeightFormat, quantize
from support.small_graphs import normal

Array = npt.NDArray[Any]


def _decoded(stored: BlockWeight, columns: int) -> Array:
    """Values [..., N, columns] by MatMulNBits' description: the first 4-bit code of a byte is in its low half."""

    def codes(packed: Array) -> Array:
        if stored.bits == 8:
            return packed.astype(np.float32)
        return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1).astype(np.float32)

    scales = stored.scales.numpy()
    points: Any = float(1 << (stored.bits - 1))
    if stored.zero_points is not None:
        points = codes(stored.zero_points.numpy())[..., : scales.shape[-1]].repeat(stored.block_size, -1)
    values = (codes(stored.codes.numpy()) - points) * scales.repeat(stored.block_size, -1)
    # The kernels multiply what fills up the last block by 0; without zero points it stands for 0 as well.
    assert stored.zero_points is not None or not values[..., columns:].any()
    return values[..., :columns]


def _quantized(weight_format: WeightFormat, shape: tuple[int, ...], group: int, *, points: bool) -> QuantizedWeight:
    generator = np.random.default_rng(3)
    groups = (*shape[:-1], -(-shape[-1] // group))
    scales = ir.tensor(generator.uniform(0.01, 0.2, groups).astype(np.float32))
    zero_points = None
    if points:
        numbers = generator.integers(3, 12, groups).astype(np.float32)
        zero_points = weights.cast(ir.tensor(numbers), ir.DataType.UINT4)
    return quantize(ir.tensor(normal(*shape)), weight_format, scales, group_size=group, zero_points=zero_points)


@pytest.mark.parametrize("shape", [(6, 128), (5, 100), (3, 4, 96)], ids=["whole", "ragged", "experts"])
@pytest.mark.parametrize("group", [32, 64, "row"])
@pytest.mark.parametrize(("weight_format", "points"), [("int8", False), ("int4", False), ("uint4", True)])
def test_blocks_hold_the_numbers_of_the_quantized_matrix(
    weight_format: WeightFormat, points: bool, group: int | str, shape: tuple[int, ...]
) -> None:
    columns = shape[-1]
    found = _quantized(weight_format, shape, columns if group == "row" else int(group), points=points)
    size = block_size(found)
    assert size is not None
    stored = in_blocks(found, size)
    np.testing.assert_array_equal(_decoded(stored, columns), found.dequantized().numpy())


def test_smaller_block_than_the_group_repeats_its_scale() -> None:
    """The kernel for experts wants blocks that divide both widths, 704 and 1024 say, whatever the groups."""
    found = _quantized("int4", (4, 352), 128, points=False)
    size = block_size(found, divides=(352, 512))
    assert size == 32
    np.testing.assert_array_equal(_decoded(in_blocks(found, size), 352), found.dequantized().numpy())


@pytest.mark.parametrize(
    ("columns", "group", "divides", "size"),
    [(896, 896, (), 128), (96, 96, (), 32), (100, 100, (), 16), (200, 50, (), None), (64, 32, (48,), 16)],
)
def test_block_is_the_largest_that_fits(columns: int, group: int, divides: tuple[int, ...], size: int | None) -> None:
    assert block_size(_quantized("int8", (2, columns), group, points=False), divides=divides) == size


def test_rounded_reaches_the_largest_value_of_each_group_and_survives_zeros() -> None:
    matrix = normal(4, 70)
    matrix[1, :32] = 0
    found = rounded(ir.tensor(matrix), "int4", 32)
    codes = found.codes.numpy().astype(np.float32)
    for start in (0, 32, 64):
        largest = np.abs(codes[:, start : start + 32]).max(1)
        assert set(largest.tolist()) <= {7.0, 0.0} and (largest == 0).sum() == (start == 0)
    step = found.scales.numpy().repeat(32, 1)[:, :70]
    assert (np.abs(found.dequantized().numpy() - matrix) <= step / 2 * (1 + 1e-6)).all()


def test_fp8_has_no_blocks() -> None:
    with pytest.raises(ValueError, match="no blocks of integers"):
        in_blocks(_quantized("fp8", (2, 32), 32, points=False), 32)
