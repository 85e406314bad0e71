"""Codes out of the 32-bit words that GPTQ, AWQ and compressed-tensors pack them in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.transforms import Array, Dims, RowWise
from qwenforge.exporter.weights import DerivedTensor, dims

WORD_BITS = 32


@dataclass(frozen=True)
class Unpack(RowWise):
    """Words [R, W] int32 of p = 32 / bits unsigned fields to codes: [R, W * p], or [R, p, W] with ``across_rows``.

    Attributes:
        bits: of a field, 4 or 8; field 0 is in the lowest bits.
        to: dtype of the codes.
        add: what is added to a field to make the code it stands for; the sum must be in the range of ``to``.
        order: code j of a word is its field ``order[j]``; empty for the fields' own order.
        across_rows: a word holds p codes of one column instead of one row.
    """

    bits: int
    to: ir.DataType
    add: int = 0
    order: tuple[int, ...] = ()
    across_rows: bool = False

    def shape(self, sources: Sequence[Dims]) -> Dims:
        rows, words = sources[0]
        fields = WORD_BITS // self.bits
        return (rows, fields, words) if self.across_rows else (rows, words * fields)

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        if sources[0] != ir.DataType.INT32:
            raise ValueError(f"codes are packed in INT32, not {sources[0].name}")
        return self.to

    def apply(self, sources: Sequence[Array]) -> Array:
        words = np.ascontiguousarray(sources[0])
        octets = words.view(np.uint8).reshape(*words.shape, 4)  # little-endian, as safetensors stores them
        fields = octets if self.bits == 8 else np.stack([octets & 15, octets >> 4], axis=-1).reshape(*words.shape, 8)
        if self.order:
            fields = fields[..., list(self.order)]
        codes = fields if self.add == 0 else (fields.astype(np.int16) + self.add).astype(np.int8)
        if self.across_rows:
            codes = codes.swapaxes(1, 2)
        result: Array = codes.reshape(self.shape([words.shape])).astype(self.to.numpy())
        return result


def unpack(
    words: ir.TensorProtocol,
    bits: int,
    to: ir.DataType,
    *,
    add: int = 0,
    order: tuple[int, ...] = (),
    across_rows: bool = False,
) -> ir.TensorProtocol:
    """The codes [rows, columns] in ``words`` [R, W]; see :class:`Unpack`."""
    codes = DerivedTensor(Unpack(bits, to, add, order, across_rows), [words])
    shape = dims(codes)
    return weights.reshape(codes, (math.prod(shape[:-1]), shape[-1])) if across_rows else codes
