"""``com.microsoft::MatMulNBits`` in place of a product by a quantized matrix, on the CPU and on CUDA."""

from __future__ import annotations

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import in_blocks
from qwenforge.exporter.quantized_weights import QuantizedWeight
from qwenforge.graph_passes.infra import add_initializer, replace_node, tag

MICROSOFT = "com.microsoft"


def multiply_blocks(
    model: ir.Model,
    node: ir.Node,
    found: QuantizedWeight,
    *,
    x: ir.Value,
    block_size: int,
    accuracy_level: int,
    rule: str,
) -> None:
    """Put a MatMulNBits by ``found`` [N, K] into the place of ``node``, whose second input is the matrix.

    Args:
        x: what it multiplies, of the dtype in which the scales are stored.
        block_size: columns of a block of the kernel (:func:`qwenforge.exporter.block_codes.block_size`).
        accuracy_level: 0 computes in the dtype of ``x``, 4 rounds ``x`` to int8.
        rule: the pass that does it.
    """
    assert x.dtype is not None
    stored = in_blocks(found, block_size)
    rows, columns = weights.dims(found.codes)
    scope = str(node.inputs[1].name) if node.inputs[1] is not None else str(node.name)
    shape = (rows, weights.dims(stored.scales)[1], block_size * stored.bits // 8)
    inputs = [
        x,
        add_initializer(model, f"{scope}.blocks", weights.reshape(stored.codes, shape)),
        add_initializer(model, f"{scope}.scales", weights.cast(stored.scales, x.dtype)),
    ]
    if stored.zero_points is not None:
        inputs.append(add_initializer(model, f"{scope}.zero_points", stored.zero_points))
    attributes = {
        "K": columns,
        "N": rows,
        "bits": stored.bits,
        "block_size": block_size,
        "accuracy_level": accuracy_level,
    }
    product = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=node.name)
    replace_node(model, node, [tag(product, rule)], product.outputs)
    model.graph.opset_imports[MICROSOFT] = 1
