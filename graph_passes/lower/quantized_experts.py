"""Quantized expert weights in the layouts of ``QwenForgeMoE``, as weight plans that stream expert by expert.

The slices of a shared expert go behind the routed ones where they are quantized alike. Slicing keeps the codes: a row's
scale belongs to every slice of its columns, and groups are cut only between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwenforge.errors import UnsupportedError
from qwenforge.exporter import weights
from qwenforge.exporter.packing import AsBytes, PackInt4, PackInt8
from qwenforge.exporter.quantized_weights import QuantizedWeight, WeightFormat
from qwenforge.exporter.transforms import Transform
from qwenforge.graph_passes.lower.expert_packing import ROWS
from qwenforge.graph_passes.quantize.expert_weights import experts_of

ROW_GROUP = 65536
"""``group_size`` of weights with one scale a row."""

WEIGHT_TYPES: dict[WeightFormat, int] = {"int8": 1, "int4": 2, "fp8": 3}
"""Values of ``weight_type``."""

_PACKED_BY: dict[WeightFormat, Transform] = {"int8": PackInt8(), "int4": PackInt4(), "fp8": AsBytes()}


@dataclass(frozen=True)
class QuantizedExperts:
    """``gate_up`` [E, 2I, C] and ``down`` [E, C, I] of the routed experts, or [2Is, C] and [C, Is] of a shared one."""

    gate_up: QuantizedWeight
    down: QuantizedWeight

    @property
    def width(self) -> int:
        """I, or Is."""
        return weights.dims(self.down.codes)[-1]

    @property
    def format(self) -> WeightFormat:
        """Of both matrices, which :func:`obstacle` makes sure are alike."""
        return self.gate_up.format

    @property
    def group_size(self) -> int:
        """As the attribute ``group_size``: columns that share a scale, :data:`ROW_GROUP` for a whole row."""
        if self.format == "int4":
            return self.gate_up.group_size
        whole = self.gate_up.group_size >= weights.dims(self.gate_up.codes)[-1] and self.down.group_size >= self.width
        return ROW_GROUP if whole else self.gate_up.group_size


@dataclass(frozen=True)
class PackedExperts:
    """The inputs of a ``QwenForgeMoE`` node: packed codes, and scales [E + Es, groups, rows]."""

    gate_up: ir.TensorProtocol
    down: ir.TensorProtocol
    gate_up_scales: ir.TensorProtocol
    down_scales: ir.TensorProtocol


def obstacle(experts: QuantizedExperts) -> str | None:
    """Why the plugin cannot take ``experts``; None where it can."""
    gate_up, down = experts.gate_up, experts.down
    if gate_up.format != down.format:
        return f"gate and up are {gate_up.format} and down is {down.format}; quantize both alike"
    if gate_up.format not in WEIGHT_TYPES or gate_up.zero_points is not None or down.zero_points is not None:
        return "they have zero points and the plugin's weights are symmetric; quantize to int4 or int8"
    group = experts.group_size
    if group != ROW_GROUP and gate_up.group_size != down.group_size:  # INT4, or INT8 and FP8 in groups
        return f"gate and up have groups of {gate_up.group_size} and down of {down.group_size}; quantize both alike"
    if gate_up.format == "int4" and group not in (64, 128):
        return f"they are INT4 in groups of {group}, and the plugin has groups of 64 and 128"
    if gate_up.format != "int4" and group != ROW_GROUP:
        return f"they are {gate_up.format.upper()} in groups of {group}, and the plugin has one scale a row"
    return None


def fits_behind(shared: QuantizedExperts, routed: QuantizedExperts) -> bool:
    """Whether slices of ``shared`` can stand behind the ``routed`` experts: format, groups and places of cuts agree."""
    if obstacle(shared) is not None or (shared.format, shared.group_size) != (routed.format, routed.group_size):
        return False
    return routed.group_size == ROW_GROUP or routed.width % routed.group_size == 0


def pack_experts(routed: QuantizedExperts, shared: QuantizedExperts | None, dtype: ir.DataType) -> PackedExperts:
    """The routed experts and the slices of the shared one, packed; INT4 has scales of ``dtype``, the tokens'.

    Raises:
        UnsupportedError: rows or columns are not whole blocks of the layout.
    """
    matrices = [_experts(routed.gate_up), _experts(routed.down)]
    if shared is not None:
        for found, more in zip(matrices, _slices(shared, routed.width), strict=True):
            found += more
    first, second = matrices
    try:
        first = [_interleaved(matrix) for matrix in first]
        packed = [weights.stack([_packed(matrix) for matrix in found], 0) for found in (first, second)]
    except ValueError as error:
        raise UnsupportedError(f"the expert weights cannot be packed for the plugin: {error}.") from error
    scale_dtype = dtype if routed.format == "int4" else ir.DataType.FLOAT
    scales = [
        weights.cast(weights.stack([weights.transpose(matrix.scales, (1, 0)) for matrix in found], 0), scale_dtype)
        for found in (first, second)
    ]
    return PackedExperts(packed[0], packed[1], scales[0], scales[1])


def _experts(stacked: QuantizedWeight) -> list[QuantizedWeight]:
    return [
        QuantizedWeight(codes, scales, None, stacked.group_size)
        for codes, scales in zip(experts_of(stacked.codes), experts_of(stacked.scales), strict=True)
    ]


def _slices(shared: QuantizedExperts, width: int) -> tuple[list[QuantizedWeight], list[QuantizedWeight]]:
    """The shared expert as experts of ``width`` channels, the last filled up with zeros."""
    total, first, second = shared.width, [], []
    for start in range(0, total, width):
        end = min(start + width, total)
        halves = [_rows(shared.gate_up, offset + start, offset + end, width) for offset in (0, total)]
        codes = weights.concat([half.codes for half in halves], 0)
        scales = weights.concat([half.scales for half in halves], 0)
        first.append(QuantizedWeight(codes, scales, None, shared.gate_up.group_size))
        second.append(_columns(shared.down, start, end, width))
    return first, second


def _rows(matrix: QuantizedWeight, start: int, end: int, count: int) -> QuantizedWeight:
    """``count`` rows from ``start`` on, those from ``end`` on zeros."""
    codes, scales = (weights.slice_(tensor, 0, start, end) for tensor in (matrix.codes, matrix.scales))
    return QuantizedWeight(
        _filled(codes, 0, count, 0), _filled(scales, 0, count, 1), None, min(matrix.group_size, ROW_GROUP)
    )


def _columns(matrix: QuantizedWeight, start: int, end: int, count: int) -> QuantizedWeight:
    """``count`` columns from ``start`` on, those from ``end`` on zeros."""
    codes = _filled(weights.slice_(matrix.codes, 1, start, end), 1, count, 0)
    if weights.dims(matrix.scales)[1] == 1:
        return QuantizedWeight(codes, matrix.scales, None, count)
    group = matrix.group_size
    scales = weights.slice_(matrix.scales, 1, start // group, -(-end // group))
    return QuantizedWeight(codes, _filled(scales, 1, -(-count // group), 1), None, group)


def _interleaved(matrix: QuantizedWeight) -> QuantizedWeight:
    codes, scales = (weights.interleave_rows(tensor, ROWS) for tensor in (matrix.codes, matrix.scales))
    return QuantizedWeight(codes, scales, None, matrix.group_size)


def _packed(matrix: QuantizedWeight) -> ir.TensorProtocol:
    return weights.DerivedTensor(_PACKED_BY[matrix.format], [matrix.codes])


def _filled(tensor: ir.TensorProtocol, axis: int, size: int, number: int) -> ir.TensorProtocol:
    """``tensor`` with ``number`` behind it, up to ``size`` along ``axis``."""
    have: Sequence[int] = weights.dims(tensor)
    if have[axis] == size:
        return tensor
    missing = [size - length if index == axis else length for index, length in enumerate(have)]
    rest = np.full(missing, number, np.float32).astype(tensor.dtype.numpy())
    return weights.concat([tensor, ir.tensor(rest, dtype=tensor.dtype, name="filling")], axis)
