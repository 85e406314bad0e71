"""Expert weights in the layout of ``QwenForgeMoE`` (layout version 1), as weight plans: nothing is read here.

``gate_up`` is [E + Es, 2I, C]: E routed experts, then the slices of the shared one; within an expert the rows come in
groups of 16, 8 of the gate and then the 8 of up that belong to them, so that one 16-row tile of a matrix instruction
holds both and the activation needs no exchange between threads. ``down`` is [E + Es, C, I]. plugins/moe/README.md
describes it for the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.tensorrt_choice import LAYOUT_VERSION

ROWS = 8
"""Rows of the gate, and then of up, that stand together."""

assert LAYOUT_VERSION == 1


@dataclass(frozen=True)
class SharedSlices:
    """The shared expert cut into experts of width I: ``gate_up`` [Es, 2I, C] unpacked and ``down`` [Es, C, I]."""

    gate_up: ir.TensorProtocol
    down: ir.TensorProtocol


def shared_slices(gate_up: ir.TensorProtocol, down: ir.TensorProtocol, width: int) -> SharedSlices:
    """Cut a shared expert, ``gate_up`` [C, 2Is] and ``down`` [Is, C] as a MatMul takes them, into experts of ``width``.

    The last slice is filled up with zeros: a channel whose gate and up are 0 adds 0.
    """
    rows, columns = weights.transpose(gate_up, (1, 0)), weights.transpose(down, (1, 0))
    total = weights.dims(down)[0]
    first, second = [], []
    for start in range(0, total, width):
        end = min(start + width, total)
        parts = [_filled(weights.slice_(rows, 0, offset + start, offset + end), 0, width) for offset in (0, total)]
        first.append(weights.concat(parts, 0))
        second.append(_filled(weights.slice_(columns, 1, start, end), 1, width))
    return SharedSlices(weights.stack(first, 0), weights.stack(second, 0))


def pack_gate_up(gate_up: ir.TensorProtocol, shared: SharedSlices | None) -> ir.TensorProtocol:
    """Routed experts [E, 2I, C] (gate rows, then up rows) and the shared slices, packed."""
    routed = weights.interleave_rows(gate_up, ROWS)
    if shared is None:
        return routed
    return weights.concat([routed, weights.interleave_rows(shared.gate_up, ROWS)], 0)


def pack_down(down: ir.TensorProtocol, shared: SharedSlices | None) -> ir.TensorProtocol:
    """Routed experts [E, C, I] and the shared slices."""
    return down if shared is None else weights.concat([down, shared.down], 0)


def _filled(tensor: ir.TensorProtocol, axis: int, size: int) -> ir.TensorProtocol:
    """``tensor`` with zeros behind it, up to ``size`` along ``axis``."""
    have = weights.dims(tensor)
    if have[axis] == size:
        return tensor
    missing = [size - length if index == axis else length for index, length in enumerate(have)]
    zeros = ir.tensor(np.zeros(missing, tensor.dtype.numpy()), dtype=tensor.dtype, name="zeros")
    return weights.concat([tensor, zeros], axis)
