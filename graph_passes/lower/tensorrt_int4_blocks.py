"""Integer codes that TensorRT has no form for, as INT4 blocks with the same values: zero points and groups of INT8.

TensorRT's integers are symmetric: INT8 with one scale a row, INT4 with one for blocks of 64 or 128 columns. Codes of 4
and of 8 bits in groups of whole blocks are sums of such INT4 numbers, so that nothing is rounded:

    4 bits   (code - zero) s = (code - 8) s + (8 - zero) s
    8 bits   (code - zero) s = high 16 s + low s + (8 - zero) s,   code + 128 = 16 (high + 8) + (low + 8)

The first terms are INT4 blocks (of 8 bits twice as many columns, multiplied by the tokens twice over, and as many bytes
as INT8). The last term is the same for all columns of a group: it multiplies the sum of a token's channels in the group
and takes one small matrix product. Its factors have more digits than 16 bits hold and are kept as two numbers, rounded
and what that leaves, which together are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import RepeatGroups
from qwenforge.exporter.quantized_weights import QuantizedWeight, WeightFormat, as_quantized
from qwenforge.exporter.transforms import Array, Dims, RowWise, cast_array
from qwenforge.exporter.weights import DerivedTensor
from qwenforge.graph_passes.infra import FusionPass, add_initializer, constant, replace_node, tag
from qwenforge.graph_passes.quantize.sites import is_linear

BLOCKS = (128, 64)
"""Columns that share a scale of TensorRT's INT4."""

_MIDDLE: dict[WeightFormat, int] = {"int4": 0, "uint4": 8, "int8": 8}
"""What the INT4 numbers of a code leave out, in units of its scale."""


@dataclass(frozen=True)
class Int4Part(RowWise):
    """Codes [N, K] to INT4 [N, K]: UINT4 less 8, INT4 as it is, of INT8 the high or the low half."""

    high: bool = False

    def shape(self, sources: Sequence[Dims]) -> Dims:
        return sources[0]

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        return ir.DataType.INT4

    def apply(self, sources: Sequence[Array]) -> Array:
        (codes,) = sources
        numbers = codes.astype(np.int16)
        if codes.dtype == np.int8:
            unsigned = numbers + 128
            numbers = (unsigned >> 4 if self.high else unsigned & 15) - 8
        elif codes.dtype == ir.DataType.UINT4.numpy():
            numbers -= 8
        result: Array = numbers.astype(ir.DataType.INT4.numpy())
        return result


@dataclass(frozen=True)
class GroupOffset(RowWise):
    """Scales [N, G] float32, and zero points if there are two sources, to (middle - zero point) * scale in ``to``.

    With ``rest`` it is what rounding to ``to`` leaves of that product, itself exact in ``to``.
    """

    middle: int
    to: ir.DataType
    rest: bool = False

    def shape(self, sources: Sequence[Dims]) -> Dims:
        return sources[0]

    def dtype(self, sources: Sequence[ir.DataType]) -> ir.DataType:
        return self.to

    def apply(self, sources: Sequence[Array]) -> Array:
        scales, *points = sources
        exact = scales.astype(np.float64) * (self.middle - points[0].astype(np.float64) if points else self.middle)
        rounded = cast_array(exact, self.to)
        return cast_array(exact - rounded.astype(np.float64), self.to) if self.rest else rounded


@dataclass(frozen=True)
class _Matrix:
    """A matrix in the graph: INT4 blocks [P K, N], dequantized, and the groups' factors [G, N] or [2 G, N] if any."""

    blocks: ir.Value
    offsets: ir.Value | None


class Int4Blocks(FusionPass):
    """Rewrite every product by integers that TensorRT does not take and INT4 blocks can stand for."""

    name: ClassVar[str] = "tensorrt_int4_blocks"

    def run(self, model: ir.Model) -> None:
        self._model = model
        self._matrices: dict[ir.Value, _Matrix] = {}
        self._twice: dict[ir.Value, ir.Value] = {}
        self._sums: dict[tuple[ir.Value, int, bool], ir.Value] = {}
        for node in list(model.graph):
            value = node.inputs[1] if is_linear(node) else None
            if value is None or value.const_value is None:
                continue
            found = as_quantized(weights.transpose(value.const_value, (1, 0)))
            block = block_for(found) if found is not None else None
            if found is not None and block is not None:
                self._rewrite(node, value, found, block)
                self.matches += 1

    def _rewrite(self, node: ir.Node, value: ir.Value, found: QuantizedWeight, block: int) -> None:
        x = node.inputs[0]
        assert x is not None
        if value not in self._matrices:
            self._matrices[value] = self._stored(node, value, found, block)
        matrix = self._matrices[value]
        tokens = self._doubled(node, x) if found.format == "int8" else x
        product = self._made("MatMul", [tokens, matrix.blocks], f"{node.name}.blocks")
        nodes = [product]
        if matrix.offsets is not None:
            offsets = matrix.offsets
            assert offsets.shape is not None
            columns = weights.dims(found.codes)[-1]
            groups = weights.dims(found.scales)[-1]
            sums = self._group_sums(node, x, groups, columns // groups, twice=offsets.shape[0] == 2 * groups)
            correction = self._made("MatMul", [sums, offsets], f"{node.name}.offsets")
            total = self._made("Add", [product.outputs[0], correction.outputs[0]], f"{node.name}.sum")
            nodes += [correction, total]
        for each in nodes:
            each.outputs[0].shape, each.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        replace_node(self._model, node, nodes, nodes[-1].outputs)

    def _stored(self, node: ir.Node, value: ir.Value, found: QuantizedWeight, block: int) -> _Matrix:
        """The initializers that stand for ``value``, and the node in front of ``node`` that dequantizes the blocks."""
        assert value.const_value is not None
        dtype = value.const_value.dtype
        rows, columns = weights.dims(found.codes)
        spread = DerivedTensor(RepeatGroups(found.group_size, block, columns // block), [found.scales])
        parts: list[ir.TensorProtocol] = [DerivedTensor(Int4Part(), [found.codes])]
        scales: list[ir.TensorProtocol] = [spread]
        if found.format == "int8":
            parts.insert(0, DerivedTensor(Int4Part(high=True), [found.codes]))
            scales.insert(0, weights.multiply(spread, ir.tensor(np.full((1, 1), 16, np.float32))))
        codes = add_initializer(self._model, f"{value.name}.codes", _by_column(parts))
        held = add_initializer(self._model, f"{value.name}.scales", weights.cast(_by_column(scales), dtype))
        made = self._made(
            "DequantizeLinear", [codes, held], f"{value.name}.dequantize", {"axis": 0, "block_size": block}
        )
        blocks = made.outputs[0]
        blocks.name, blocks.type = f"{value.name}.dequantized", value.type
        blocks.shape = ir.Shape([len(parts) * columns, rows])
        self._model.graph.insert_before(node, made)
        middle = _MIDDLE[found.format]
        if middle == 0 and found.zero_points is None:
            return _Matrix(blocks, None)
        sources = [found.scales] + ([found.zero_points] if found.zero_points is not None else [])
        # 8 times a scale has the scale's own digits: nothing is left of it.
        rests = (False, True) if found.zero_points is not None else (False,)
        offsets = [DerivedTensor(GroupOffset(middle, dtype, rest), sources) for rest in rests]
        return _Matrix(blocks, add_initializer(self._model, f"{value.name}.offsets", _by_column(offsets)))

    def _doubled(self, node: ir.Node, x: ir.Value) -> ir.Value:
        """``x`` beside itself, [.., 2 K], for both halves of 8-bit codes; once for all readers of ``x``."""
        if x not in self._twice:
            self._twice[x] = self._beside(node, x, x)
        return self._twice[x]

    def _group_sums(self, node: ir.Node, x: ir.Value, groups: int, size: int, *, twice: bool) -> ir.Value:
        """The sums of ``x`` over each group's channels, [.., G] or, beside themselves, [.., 2 G]; once for all."""
        assert x.shape is not None and x.name is not None
        key = (x, groups, twice)
        if key not in self._sums:
            split_shape = constant(self._model, f"{x.name}.groups_of_{size}", [*[0] * (len(x.shape) - 1), groups, size])
            axis = constant(self._model, "int4_blocks.last_axis", [-1])
            split = self._made("Reshape", [x, split_shape], f"{x.name}.in_groups_of_{size}")
            summed = self._made("ReduceSum", [split.outputs[0], axis], f"{x.name}.sums_of_{size}", {"keepdims": 0})
            for each, last in ((split, [groups, size]), (summed, [groups])):
                each.outputs[0].shape, each.outputs[0].type = ir.Shape([*x.shape[:-1], *last]), x.type
            self._model.graph.insert_before(node, [split, summed])
            sums = summed.outputs[0]
            self._sums[key] = self._beside(node, sums, sums) if twice else sums
        return self._sums[key]

    def _beside(self, node: ir.Node, first: ir.Value, second: ir.Value) -> ir.Value:
        """Both along the last axis, computed before ``node``."""
        made = self._made("Concat", [first, second], f"{first.name}.twice", {"axis": -1})
        assert first.shape is not None
        last = first.shape[-1]
        assert isinstance(last, int)
        made.outputs[0].shape, made.outputs[0].type = ir.Shape([*first.shape[:-1], 2 * last]), first.type
        self._model.graph.insert_before(node, made)
        return made.outputs[0]

    def _made(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, attributes: dict[str, int] | None = None
    ) -> ir.Node:
        node = tag(ir.node(op_type, inputs, attributes, name=name), self.name)
        node.outputs[0].name = name
        return node


def block_for(found: QuantizedWeight) -> int | None:
    """The size of the INT4 blocks that stand for ``found``; None where TensorRT takes it as it is or no block does."""
    columns = weights.dims(found.codes)[-1]
    group = min(found.group_size, columns)
    if found.format not in _MIDDLE or columns % group:
        return None
    if found.zero_points is None and (
        (found.format == "int4" and group in BLOCKS) or (found.format == "int8" and group == columns)
    ):
        return None
    return next((size for size in BLOCKS if group % size == 0), None)


def _by_column(tensors: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    """Tensors [N, X] beside each other, transposed."""
    return weights.transpose(weights.concat(tensors, 1), (1, 0))
