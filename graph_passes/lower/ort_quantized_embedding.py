"""An embedding tied to a quantized vocabulary projection -> ``com.microsoft::GatherBlockQuantized`` of its codes.

The two matrices are one in the checkpoint. Where the projection is quantized, a table in floating point beside it would
be most of a small model's file; the rows are read from the projection's codes in its stead, which rounds them as it
rounds the projection. Both nodes read the same bytes of the data file.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import block_size, in_blocks
from qwenforge.exporter.weights import dims
from qwenforge.graph_passes.infra import FusionPass, add_initializer, replace_node, tag, weight
from qwenforge.graph_passes.lower.ort_block_product import MICROSOFT
from qwenforge.graph_passes.lower.ort_quantized_linear import quantized_matrix, unquantized


class TiedQuantizedEmbedding(FusionPass):
    """Read embeddings from the quantized projection's codes. Runs before the projection is lowered."""

    name: ClassVar[str] = "ort_tied_quantized_embedding"

    def run(self, model: ir.Model) -> None:
        tables = {}
        for node in model.graph:
            table = weight(node.inputs[0]) if node.op_type == "Gather" and not node.domain else None
            if table is not None and len(table.shape) == 2:
                tables[weights.plan_key(_wide(table))] = node
        for product in list(model.graph):
            found = quantized_matrix(product)
            if found is None or found.format == "fp8":
                continue
            matrix = weight(product.inputs[1])
            assert matrix is not None
            gather = tables.get(weights.plan_key(_wide(unquantized(weights.transpose(matrix, (1, 0))))))
            if gather is None:
                continue
            size = block_size(found)
            if size is None or dims(found.codes)[1] % size:
                self.fail("the table's columns are no whole number of blocks", gather)
                continue
            stored = in_blocks(found, size)
            dtype = gather.outputs[0].dtype or ir.DataType.FLOAT
            name = gather.inputs[0].name if gather.inputs[0] is not None else gather.name
            inputs = [
                add_initializer(model, f"{name}.codes", stored.codes),
                gather.inputs[1],
                add_initializer(model, f"{name}.scales", weights.cast(stored.scales, dtype)),
            ]
            if stored.zero_points is not None:
                inputs.append(add_initializer(model, f"{name}.zero_points", stored.zero_points))
            attributes = {"bits": stored.bits, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
            lookup = ir.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT, name=gather.name)
            replace_node(model, gather, [tag(lookup, self.name)], lookup.outputs)
            model.graph.opset_imports[MICROSOFT] = 1
            self.matches += 1


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return weights.cast(tensor, ir.DataType.FLOAT)
