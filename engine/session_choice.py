"""ONNX Runtime session configuration that a bundle records, so that it runs as it was judged."""

from __future__ import annotations

from types import MappingProxyType

import onnx_ir as ir

MAPPED_WEIGHTS = MappingProxyType({"session.disable_prepacking": "1"})
"""Weights stay mapped from the data file: prepacking copies them into memory.

Not for a quantized graph, whose kernels compute in another way, and very slowly, without prepacking.
"""
AS_WRITTEN = MappingProxyType({"session.disable_quant_qdq": "1"})
"""QuantizeLinear and DequantizeLinear are run as they stand.

By default ONNX Runtime (1.32) fuses them with the products behind them, which rounds activations to INT8 that no node
rounds (``session.qdq_matmulnbits_accuracy_level`` mends that for weights alone) and makes a product of INT8 by INT8
forty times slower. As written, weights are dequantized when the session is made and products are of floats.
"""


def session_choice(target: str, model: ir.Model, weights: str) -> dict[str, str]:
    """The configuration for ``model``, as lowered for ``target``, with its ``weights`` copied or linked."""
    chosen: dict[str, str] = {}
    if weights == "link":
        chosen |= MAPPED_WEIGHTS
    if target == "portable" and any(node.op_type == "DequantizeLinear" for node in model.graph):
        chosen |= AS_WRITTEN
    return chosen
