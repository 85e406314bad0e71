"""Products by quantized matrices -> ``com.microsoft::MatMulNBits`` of ONNX Runtime's CUDA provider, weights alone.

Its kernel takes 4 and 8 bits in blocks of 16 to 128 columns, in fp16 and bf16, and computes in them. Quantized inputs
and FP8 are refused: nothing is known here that fuses QuantizeLinear and DequantizeLinear into a product on CUDA, and
unfused they write values and whole matrices out in 16 bits at every call.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.errors import UnsupportedError
from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import block_size
from qwenforge.exporter.quantized_weights import QuantizedWeight, as_quantized
from qwenforge.graph_passes.functions import MIXTURE_OF_EXPERTS, QUANTIZED_ATTENTION, QUANTIZED_EXPERTS
from qwenforge.graph_passes.infra import FusionPass, is_op
from qwenforge.graph_passes.lower.ort_block_product import multiply_blocks
from qwenforge.graph_passes.quantize.sites import is_linear

_AS_THE_TOKENS = 0
"""accuracy_level: products in the dtype of the tokens."""


class CudaQuantizedLinear(FusionPass):
    """Replace every product by a quantized matrix."""

    name: ClassVar[str] = "ort_cuda_quantized_linear"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if not is_linear(node):
                continue
            if is_op(node.inputs[0], "DequantizeLinear") is not None:
                raise UnsupportedError(
                    f"the input of node {node.name} is quantized, and ONNX Runtime on CUDA multiplies no quantized "
                    "activations without writing them out again; use int8-weight-only or int4-weight-only, or --target "
                    "tensorrt."
                )
            value = node.inputs[1]
            assert value is not None and value.const_value is not None
            found = as_quantized(weights.transpose(value.const_value, (1, 0)))
            if found is not None:
                self._rewrite(model, node, found)
                self.matches += 1

    def _rewrite(self, model: ir.Model, node: ir.Node, found: QuantizedWeight) -> None:
        x, size = node.inputs[0], block_size(found)
        assert x is not None
        if found.format == "fp8" or size is None:
            what = "is FP8" if found.format == "fp8" else f"has groups of {found.group_size} columns"
            raise UnsupportedError(
                f"the weight of node {node.name} {what}, and ONNX Runtime on CUDA multiplies 4 and 8 bit integers in "
                "blocks of 16 to 128; use int8-weight-only or int4-weight-only, or --target tensorrt."
            )
        multiply_blocks(model, node, found, x=x, block_size=size, accuracy_level=_AS_THE_TOKENS, rule=self.name)


class RequireCustomOps(FusionPass):
    """Changes nothing: refuses 8-bit caches and quantized experts that are left for ONNX Runtime's own operators."""

    name: ClassVar[str] = "ort_cuda_quantized_layers"

    def run(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.domain != names.DOMAIN:
                continue
            if node.op_type == QUANTIZED_ATTENTION:
                raise UnsupportedError(
                    f"the cache of node {node.name} is of 8 bits, which ONNX Runtime's own attention is not used with "
                    "here; use --attention plugin, or leave the cache unquantized."
                )
            quantized = node.op_type == MIXTURE_OF_EXPERTS and any(
                value is not None and value.const_value is not None and as_quantized(value.const_value) is not None
                for value in node.inputs[2:4]
            )
            if quantized or node.op_type == QUANTIZED_EXPERTS:
                raise UnsupportedError(
                    f"the experts of node {node.name} are quantized, and ONNX Runtime's own operator is not used with "
                    "that here; use --experts plugin, or keep the experts unquantized."
                )
