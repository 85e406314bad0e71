"""Packed weights, compared with the layouts as README.md describes them, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from qwenforge import op_spec, tensorrt_choice
from qwenforge.plugins.moe.packing import (
    LAYOUT_VERSION,
    ROW_GROUP,
    Expert,
    WeightType,
    interleave,
    pack_experts,
    pack_float8,
    pack_int4,
    pack_int4_values,
    pack_int8,
    pack_int8_values,
    unpack_int4,
    unpack_int8,
)

RANDOM = np.random.default_rng(0)


def test_layout_version_is_the_one_that_the_front_ends_take() -> None:
    (attribute,) = (item for item in op_spec.load("moe").attributes if item.name == "layout_version")
    assert LAYOUT_VERSION == tensorrt_choice.LAYOUT_VERSION == attribute.minimum == attribute.maximum


def test_int8_bytes_lie_as_a_matrix_instruction_deals_them_out() -> None:
    values = RANDOM.integers(-128, 128, (3, 64), dtype=np.int8)
    packed = pack_int8_values(values).view(np.uint8)
    for row in range(3):
        for block in range(0, 64, 16):
            for lane in range(4):
                wanted = [values[row, block + column] for column in _columns_of(lane)]
                assert [int(byte) - 128 for byte in packed[row, block + 4 * lane :][:4]] == wanted
    assert (unpack_int8(packed.view(np.int8)) == values).all()


def test_int4_words_hold_pairs_four_bits_apart() -> None:
    values = RANDOM.integers(-8, 8, (3, 128), dtype=np.int8)
    words = pack_int4_values(values).view(np.uint32)
    for row in range(3):
        for block in range(4):  # of 32 columns, four words
            for lane in range(4):
                word = int(words[row, 4 * block + lane])
                first, second = ([32 * block + 16 * half + column for column in _columns_of(lane)] for half in range(2))
                pairs = [first[:2], first[2:], second[:2], second[2:]]
                for pair, (low, high) in enumerate(pairs):
                    assert (word >> 4 * pair & 15) - 8 == values[row, low]
                    assert (word >> 4 * (pair + 4) & 15) - 8 == values[row, high]
    assert (unpack_int4(words.view(np.int8)) == values).all()


def _columns_of(lane: int) -> list[int]:
    """Of 16 columns, those that lane ``lane`` of four holds of a fragment of A (PTX, mma.m16n8k16)."""
    return [2 * lane, 2 * lane + 1, 2 * lane + 8, 2 * lane + 9]


def test_gate_and_up_alternate_in_eights() -> None:
    gate, up = (RANDOM.normal(size=(16, 8)) for _ in range(2))
    rows = interleave(gate, up)
    assert (rows[:8] == gate[:8]).all() and (rows[8:16] == up[:8]).all()
    assert (rows[16:24] == gate[8:]).all() and (rows[24:] == up[8:]).all()


@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("group_size", [64, 128])
def test_int4_is_within_half_a_step_of_the_weight(group_size: int, scale_dtype: type) -> None:
    weight = RANDOM.normal(size=(2, 4, 192)).astype(np.float32)
    weight[0, 0, :64] = 0
    packed, scales = pack_int4(weight, group_size, scale_dtype)
    assert packed.shape == (2, 4, 96) and scales.shape == (2, -(-192 // group_size), 4) and scales.dtype == scale_dtype
    steps = np.swapaxes(np.repeat(scales.astype(np.float32), group_size, 1)[:, :192], 1, 2)
    # A scale rounded down leaves the largest weight up to 2^-9 * 7 beyond the last number.
    assert (np.abs(unpack_int4(packed) * steps - weight) <= 0.516 * steps).all()
    assert not unpack_int4(packed)[0, 0, :64].any()


@pytest.mark.parametrize(("pack", "relative"), [(pack_int8, None), (pack_float8, 2**-4)])
def test_rows_have_a_scale_that_their_largest_weight_needs(pack, relative) -> None:  # type: ignore[no-untyped-def]
    weight = RANDOM.normal(size=(2, 4, 64)).astype(np.float32) * np.geomspace(1e-6, 1e3, 4)[None, :, None]
    weight = weight.astype(np.float32)
    packed, scales = pack(weight)
    assert packed.dtype == np.int8 and scales.dtype == np.float32 and scales.shape == (2, 1, 4)
    steps = np.swapaxes(scales, 1, 2)
    if relative is None:
        assert (np.abs(unpack_int8(packed) * steps - weight) <= 0.5001 * steps).all()
    else:
        found = packed.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * steps
        assert (np.abs(found - weight) <= relative * np.abs(weight) + steps * 2**-10).all()


def test_experts_are_packed_one_at_a_time() -> None:
    read = []

    def experts() -> Iterator[Expert]:
        for index in range(3):
            read.append(index)
            yield Expert(*(RANDOM.normal(size=shape) for shape in ((64, 128), (64, 128), (128, 64))))

    packed = pack_experts(experts(), WeightType.INT4, group_size=64)
    first = next(packed)
    assert read == [0]
    assert first.gate_up.shape == (128, 64) and first.down.shape == (128, 32)
    assert first.gate_up_scales is not None and first.gate_up_scales.shape == (2, 128)
    assert first.down_scales is not None and first.down_scales.shape == (1, 128)
    assert len(list(packed)) == 2


@pytest.mark.parametrize(
    ("kind", "group_size", "hidden", "sentence"),
    [
        (WeightType.INT8, ROW_GROUP, 96, "96 columns cannot be packed: they have to be a multiple of 64"),
        (WeightType.INT4, 32, 64, "group_size is 32: INT4 weights"),
        (WeightType.INT4, ROW_GROUP, 64, "group_size is 65536: INT4 weights"),
        (WeightType.FLOAT8, 128, 64, "group_size is 128: FLOAT8 weights have one scale a row"),
    ],
)
def test_what_cannot_be_packed_is_named(kind: WeightType, group_size: int, hidden: int, sentence: str) -> None:
    expert = Expert(np.zeros((64, hidden)), np.zeros((64, hidden)), np.zeros((hidden, 64)))
    with pytest.raises(ValueError, match=sentence):
        list(pack_experts([expert], kind, group_size=group_size))


def test_matrices_that_do_not_belong_together_are_named() -> None:
    expert = Expert(np.zeros((64, 64)), np.zeros((64, 64)), np.zeros((64, 128)))
    with pytest.raises(ValueError, match=r"expert 0: gate \(64, 64\), up \(64, 64\) and down \(64, 128\)"):
        list(pack_experts([expert], WeightType.INT8))
