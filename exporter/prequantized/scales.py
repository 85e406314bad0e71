"""Scales of a whole tensor, of its rows, or of blocks of rows and columns, as the [N, G] of a quantized weight."""

from __future__ import annotations

import math

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.transforms import Dims, RepeatRows
from qwenforge.exporter.weights import DerivedTensor, dims

ONE: tuple[Dims, ...] = ((), (1,), (1, 1))
"""The shapes under which one number is stored."""


def as_column(tensor: ir.TensorProtocol, rows: int) -> ir.TensorProtocol:
    """One number, or one for each row in whatever shape, as [rows, 1]."""
    count = math.prod(dims(tensor))
    column = weights.reshape(tensor, (count, 1))
    return column if count == rows else DerivedTensor(RepeatRows(rows, rows), [column])


def block_rows(tensor: ir.TensorProtocol, rows: int, block: int) -> ir.TensorProtocol:
    """Scales [ceil(rows / block), G] of blocks of ``block`` rows as [rows, G]."""
    return DerivedTensor(RepeatRows(block, rows), [tensor])
