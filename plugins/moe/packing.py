"""Expert weights in the packed layouts of ``QwenForgeMoE`` (layout version 1), quantized where asked.

One expert at a time: memory holds one expert's matrices, whatever the layer's size. README.md in this folder describes
the layouts; :func:`unpack_int8` and :func:`unpack_int4` are their inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.exporter.packing import BYTE_COLUMNS, NIBBLE_COLUMNS

Array = npt.NDArray[Any]

LAYOUT_VERSION = 1
"""What the attribute ``layout_version`` of a graph with these weights says; both front ends refuse any other."""
ROWS = 8
"""Rows of the gate, and then of up, that stand together."""
ROW_GROUP = 65536
"""``group_size`` of weights with one scale a row."""
MULTIPLE = 64
"""Of which hidden and intermediate size of packed weights are multiples."""
LARGEST_FLOAT8 = 448.0


class WeightType(IntEnum):
    """Values of the attribute ``weight_type``."""

    FLOAT = 0
    INT8 = 1
    INT4 = 2
    FLOAT8 = 3


@dataclass(frozen=True)
class Expert:
    """One expert: ``gate`` and ``up`` [I, C], ``down`` [C, I], as torch's Linear layers hold them."""

    gate: Array
    up: Array
    down: Array


@dataclass(frozen=True)
class PackedExpert:
    """One expert as the kernels read it.

    Attributes:
        gate_up: [2 I, C], with INT4 [2 I, C / 2]; int8 bytes unless the weight type is FLOAT.
        down: [C, I], with INT4 [C, I / 2].
        gate_up_scales: [groups of C, 2 I]; None for FLOAT.
        down_scales: [groups of I, C]; None for FLOAT.
    """

    gate_up: Array
    down: Array
    gate_up_scales: Array | None
    down_scales: Array | None


def pack_experts(
    experts: Iterable[Expert],
    weight_type: WeightType,
    *,
    group_size: int = ROW_GROUP,
    scale_dtype: npt.DTypeLike = np.float16,
) -> Iterator[PackedExpert]:
    """Pack experts one by one; routed ones first, then the slices of the shared one.

    Args:
        group_size: columns that share a scale: 64 or 128 for INT4, :data:`ROW_GROUP` for the others.
        scale_dtype: of INT4's scales: the dtype of the tokens. Others have float32.

    Raises:
        ValueError: a size is no multiple of 64 or the group size is not one of the weight type's.
    """
    quantize = _quantizer(weight_type, group_size, scale_dtype)
    for index, expert in enumerate(experts):
        width, hidden = expert.gate.shape
        if expert.up.shape != (width, hidden) or expert.down.shape != (hidden, width):
            raise ValueError(
                f"expert {index}: gate {expert.gate.shape}, up {expert.up.shape} and down {expert.down.shape} "
                "are not [I, C], [I, C] and [C, I]"
            )
        first, first_scales = quantize(interleave(expert.gate, expert.up))
        second, second_scales = quantize(expert.down)
        yield PackedExpert(first, second, first_scales, second_scales)


def interleave(gate: Array, up: Array) -> Array:
    """Rows in groups of 16: 8 of ``gate`` [I, C], then the 8 of ``up`` that belong to them; [2 I, C]."""
    width, hidden = gate.shape
    both = np.stack([gate.reshape(-1, ROWS, hidden), up.reshape(-1, ROWS, hidden)], 1)
    return both.reshape(2 * width, hidden)


def pack_int8(weight: Array) -> tuple[Array, Array]:
    """Quantize [..., rows, columns] to INT8, round to nearest, and pack: bytes, and float32 scales [..., 1, rows]."""
    _check_columns(weight)
    scales = _scales(np.abs(weight).max(-1).astype(np.float32) / np.float32(127))
    values = np.clip(np.rint(weight / scales[..., None]), -127, 127).astype(np.int8)
    return pack_int8_values(values), scales[..., None, :]


def pack_int8_values(values: Array) -> Array:
    """Pack INT8 weights [..., columns] as they are."""
    _check_columns(values)
    blocks = values.reshape(*values.shape[:-1], -1, 16)[..., BYTE_COLUMNS]
    return (blocks.astype(np.int16) + 128).astype(np.uint8).reshape(values.shape).view(np.int8)


def unpack_int8(packed: Array) -> Array:
    """The INT8 weights of :func:`pack_int8_values`."""
    blocks = (packed.view(np.uint8).astype(np.int16) - 128).astype(np.int8).reshape(*packed.shape[:-1], -1, 16)
    return blocks[..., np.argsort(BYTE_COLUMNS)].reshape(packed.shape)


def pack_int4(weight: Array, group_size: int, scale_dtype: npt.DTypeLike = np.float16) -> tuple[Array, Array]:
    """Quantize [..., rows, columns] to INT4, round to nearest, and pack: bytes, and scales [..., groups, rows].

    Scales are rounded to ``scale_dtype`` before they are used, so that their rounding costs nothing.
    """
    _check_columns(weight)
    columns = weight.shape[-1]
    starts = range(0, columns, group_size)
    largest = np.stack([np.abs(weight[..., start : start + group_size]).max(-1) for start in starts], -2)
    scales = _scales((largest.astype(np.float32) / np.float32(7)).astype(scale_dtype))
    of_column = np.repeat(scales.astype(np.float32), group_size, -2)[..., :columns, :]
    values = np.clip(np.rint(weight / np.swapaxes(of_column, -1, -2)), -8, 7).astype(np.int8)
    return pack_int4_values(values), scales


def pack_int4_values(values: Array) -> Array:
    """Pack INT4 weights [..., columns], int8 numbers from -8 to 7, as they are: [..., columns / 2]."""
    _check_columns(values)
    nibbles = (values.reshape(*values.shape[:-1], -1, 32)[..., NIBBLE_COLUMNS] + 8).astype(np.uint8)
    packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return packed.reshape(*values.shape[:-1], -1).view(np.int8)


def unpack_int4(packed: Array) -> Array:
    """The INT4 weights of :func:`pack_int4_values`."""
    raw = packed.view(np.uint8)
    nibbles = np.stack([raw & 15, raw >> 4], -1).astype(np.int8).reshape(*packed.shape[:-1], -1, 32) - 8
    return nibbles[..., np.argsort(NIBBLE_COLUMNS)].astype(np.int8).reshape(*packed.shape[:-1], -1)


def pack_float8(weight: Array) -> tuple[Array, Array]:
    """Quantize rows [..., rows, columns] to E4M3: bytes, and float32 scales [..., 1, rows]."""
    import ml_dtypes

    _check_columns(weight)
    scales = _scales(np.abs(weight).max(-1).astype(np.float32) / np.float32(LARGEST_FLOAT8))
    values = np.clip(weight / scales[..., None], -LARGEST_FLOAT8, LARGEST_FLOAT8).astype(np.float32)
    return values.astype(ml_dtypes.float8_e4m3fn).view(np.int8), scales[..., None, :]


def _quantizer(
    weight_type: WeightType, group_size: int, scale_dtype: npt.DTypeLike
) -> Callable[[Array], tuple[Array, Array | None]]:
    if weight_type is WeightType.INT4:
        if group_size not in (64, 128):
            raise ValueError(f"group_size is {group_size}: INT4 weights have scales for 64 or 128 columns")
        return lambda weight: pack_int4(weight.astype(np.float32), group_size, scale_dtype)
    if group_size != ROW_GROUP:
        raise ValueError(f"group_size is {group_size}: {weight_type.name} weights have one scale a row, {ROW_GROUP}")
    if weight_type is WeightType.FLOAT:
        return lambda weight: (weight, None)
    pack = pack_int8 if weight_type is WeightType.INT8 else pack_float8
    return lambda weight: pack(weight.astype(np.float32))


def _scales(scales: Array) -> Array:
    """``scales`` with 1 where a row has only zeros, so that nothing is divided by 0."""
    return np.where(scales == 0, np.ones_like(scales), scales)


def _check_columns(weight: Array) -> None:
    if weight.shape[-1] % MULTIPLE:
        raise ValueError(f"{weight.shape[-1]} columns cannot be packed: they have to be a multiple of {MULTIPLE}")
