"""Quantized matrices as ``DequantizeLinear`` nodes in front of their products: codes and scales are what is stored.

The matrix of a product is [K, N]. INT8 and FP8 rows of the checkpoint's [N, K] have one scale each, so that the scales
are [N] along axis 1; groups of columns have blocked scales [K / group, N] along axis 0. Scales are of the model's
dtype, which is the dtype that strongly typed networks give the result of the node. Experts are matrices [E, N, K] with
blocked scales, a whole row being one block.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.devices import Device
from qwenforge.errors import UnsupportedError
from qwenforge.exporter import weights
from qwenforge.exporter.quantized_weights import QuantizedWeight, as_quantized
from qwenforge.graph_passes.functions import MIXTURE_OF_EXPERTS, QUANTIZED_EXPERTS
from qwenforge.graph_passes.infra import FusionPass, add_initializer, tag
from qwenforge.graph_passes.quantize.sites import is_linear


class ExplicitDequantize(FusionPass):
    """Store every quantized matrix of a product as its codes and scales, once for all products that share it."""

    name: ClassVar[str] = "explicit_dequantize"

    def run(self, model: ir.Model) -> None:
        made: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            value = node.inputs[1] if is_linear(node) else None
            if value is None or value.const_value is None:
                continue
            if value not in made:
                found = as_quantized(weights.transpose(value.const_value, (1, 0)))
                if found is None:
                    continue
                self.require(found, node)
                made[value] = self._dequantized(model, node, value, found)
            node.replace_input_with(1, made[value])
            self.matches += 1

    def require(self, quantized: QuantizedWeight, node: ir.Node) -> None:
        """Make sure that the target takes ``quantized``, the matrix of ``node``; here anything is taken."""

    def _dequantized(self, model: ir.Model, node: ir.Node, value: ir.Value, found: QuantizedWeight) -> ir.Value:
        """The result of a new node before ``node`` that stands for ``value``."""
        assert value.const_value is not None
        columns, rows = weights.dims(value.const_value)
        dtype = value.const_value.dtype
        whole_rows = found.group_size >= columns
        codes = add_initializer(model, f"{value.name}.codes", weights.transpose(found.codes, (1, 0)))
        inputs = [codes, add_initializer(model, f"{value.name}.scales", _laid_out(found.scales, whole_rows, dtype))]
        if found.zero_points is not None:
            points = _laid_out(found.zero_points, whole_rows, found.codes.dtype)
            inputs.append(add_initializer(model, f"{value.name}.zero_points", points))
        attributes = {"axis": 1} if whole_rows else {"axis": 0, "block_size": found.group_size}
        made = tag(ir.node("DequantizeLinear", inputs, attributes, name=f"{value.name}.dequantize"), self.name)
        result = made.outputs[0]
        result.name, result.type, result.shape = f"{value.name}.dequantized", value.type, ir.Shape([columns, rows])
        model.graph.insert_before(node, made)
        return result


class ExplicitExperts(FusionPass):
    """Store the quantized weights of experts [E, N, K] as codes and blocks of scales [E, N, G] along axis 2."""

    name: ClassVar[str] = "explicit_experts"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if node.domain != names.DOMAIN or node.op_type not in (MIXTURE_OF_EXPERTS, QUANTIZED_EXPERTS):
                continue
            for index in (2, 3):
                value = node.inputs[index]
                found = as_quantized(value.const_value) if value is not None and value.const_value is not None else None
                if value is not None and found is not None:
                    node.replace_input_with(index, self._dequantized(model, node, value, found))
                    self.matches += 1

    def _dequantized(self, model: ir.Model, node: ir.Node, value: ir.Value, found: QuantizedWeight) -> ir.Value:
        assert value.const_value is not None
        inputs = [
            add_initializer(model, f"{value.name}.codes", found.codes),
            add_initializer(model, f"{value.name}.scales", weights.cast(found.scales, value.const_value.dtype)),
        ]
        if found.zero_points is not None:
            inputs.append(add_initializer(model, f"{value.name}.zero_points", found.zero_points))
        block = min(found.group_size, weights.dims(found.codes)[2])
        attributes = {"axis": 2, "block_size": block}
        made = tag(ir.node("DequantizeLinear", inputs, attributes, name=f"{value.name}.dequantize"), self.name)
        result = made.outputs[0]
        result.name, result.type, result.shape = f"{value.name}.dequantized", value.type, value.shape
        model.graph.insert_before(node, made)
        return result


class TensorRTDequantize(ExplicitDequantize):
    """The same within what TensorRT takes.

    Its documentation ("Quantization Schemes") has symmetric quantization only, INT8 and FP8 with one scale a row, and
    INT4 in blocks of 64 or 128 that divide the columns. Integers that are sums of such blocks were rewritten by
    :class:`~qwenforge.graph_passes.lower.tensorrt_int4_blocks.Int4Blocks` before.

    Args:
        device: what the engine is for; None for any device of TensorRT for RTX.
    """

    name: ClassVar[str] = "tensorrt_dequantize"

    def __init__(self, device: Device | None) -> None:
        super().__init__()
        self.device = device

    def require(self, quantized: QuantizedWeight, node: ir.Node) -> None:
        """See the class.

        Raises:
            UnsupportedError: TensorRT does not take the matrix; the message names what does.
        """
        columns = weights.dims(quantized.codes)[-1]
        group, kind = quantized.group_size, quantized.format
        whole_rows = group >= columns and quantized.zero_points is None and kind in ("int8", "fp8")
        blocks = kind == "int4" and quantized.zero_points is None and group in (64, 128) and columns % group == 0
        problem = ""
        if kind == "fp8" and not whole_rows:
            problem = f"it has groups of {group} columns, and TensorRT's FP8 has one scale a row; use --target portable"
        elif not whole_rows and not blocks:
            points = ", with zero points" if quantized.zero_points is not None else ""
            problem = (
                f"it has groups of {group} of {columns} columns{points}, and TensorRT's INT4 blocks are of 64 or 128 "
                "that divide them; quantize in groups of 64 or 128, or use --target ort-cpu or ort-cuda"
            )
        if kind == "fp8" and self.device is not None:
            self.device.require_precision("fp8")
        if problem:
            raise UnsupportedError(f"TensorRT cannot take the quantized weight of node {node.name}: {problem}.")


def _laid_out(groups: ir.TensorProtocol, whole_rows: bool, dtype: ir.DataType) -> ir.TensorProtocol:
    """[N, G] as the node reads it: [N], or [G, N]."""
    if whole_rows:
        return weights.cast(weights.reshape(groups, (weights.dims(groups)[0],)), dtype)
    return weights.cast(weights.transpose(groups, (1, 0)), dtype)
