"""QuantizeLinear and DequantizeLinear in front of products: one pair for each distinct value, format and scale.

Only the quantized readers of a value are moved behind its pair. The residual stream, norms, the router and every other
reader keep the value itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.exporter.transforms import smallest
from qwenforge.graph_passes.infra import add_initializer, tag

ActivationFormat = Literal["int8", "fp8"]

RULE = "quantize_activations"

ACTIVATION_DTYPES: dict[ActivationFormat, ir.DataType] = {
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}


@dataclass(frozen=True)
class QuantizedInput:
    """``reader``'s input 0 is to be quantized to ``format``, symmetrically, with one positive ``scale``."""

    reader: ir.Node
    format: ActivationFormat
    scale: float


def quantize_inputs(model: ir.Model, inputs: Iterable[QuantizedInput]) -> None:
    """Put the pairs into ``model`` and let the readers read them.

    Raises:
        GraphError: a reader's input is not a floating-point value of a known type.
    """
    pairs: dict[tuple[ir.Value, ActivationFormat, float], ir.Value] = {}
    for each in inputs:
        value = each.reader.inputs[0]
        if value is None or value.dtype is None or not value.dtype.is_floating_point():
            raise GraphError(f"the input of node {each.reader.name} has no known floating-point type to quantize.")
        key = (value, each.format, each.scale)
        if key not in pairs:
            pairs[key] = _pair(model, value, each.format, each.scale)
        each.reader.replace_input_with(0, pairs[key])


def rounded_scale(scale: float, dtype: ir.DataType) -> npt.NDArray[Any]:
    """``scale`` as an array [] of ``dtype``, never 0."""
    rounded = np.asarray(scale, dtype.numpy())
    return rounded if rounded > 0 else np.asarray(smallest(dtype), dtype.numpy())


def _pair(model: ir.Model, value: ir.Value, kind: ActivationFormat, scale: float) -> ir.Value:
    """The quantized and dequantized ``value``."""
    assert value.dtype is not None
    held = rounded_scale(scale, value.dtype)
    name = f"{value.name}.{kind}"
    scales = add_initializer(model, f"{name}.scale", ir.tensor(held, dtype=value.dtype))
    code = ACTIVATION_DTYPES[kind]
    zero = add_initializer(model, f"{name}.zero_point", ir.tensor(np.zeros((), code.numpy()), dtype=code))
    to_codes = ir.node("QuantizeLinear", [value, scales, zero], name=f"{name}.quantize")
    codes = to_codes.outputs[0]
    codes.name, codes.shape, codes.type = f"{name}.codes", value.shape, ir.TensorType(code)
    back = ir.node("DequantizeLinear", [codes, scales, zero], name=f"{name}.dequantize")
    result = back.outputs[0]
    result.name, result.shape, result.type = f"{name}.dequantized", value.shape, ir.TensorType(value.dtype)
    producer = value.producer()
    nodes = [tag(to_codes, RULE), tag(back, RULE)]
    if producer is not None:
        model.graph.insert_after(producer, nodes)
    else:
        model.graph.insert_before(model.graph[0], nodes)
    return result
