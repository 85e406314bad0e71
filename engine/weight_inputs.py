"""Weights that are inputs of a graph, and the bundle's file that holds them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qwenforge.exporter.safetensors_header import read_header
from qwenforge.manifest import ENGINE_WEIGHTS


def attach_weight_inputs(model: ir.Model, folder: Path) -> bool:
    """Turn inputs of ``model`` that ``folder`` holds weights for into initializers in that file; True if there are any.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / ENGINE_WEIGHTS
    if not path.is_file():
        return False
    stored = read_header(path).tensors
    for value in list(model.graph.inputs):
        place = stored.get(value.name or "")
        if place is None or value.dtype is None:
            continue
        model.graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor(
            ENGINE_WEIGHTS,
            place.offset,
            place.length,
            value.dtype,
            shape=ir.Shape(place.shape),
            name=place.name,
            base_dir=str(folder),
        )
        model.graph.register_initializer(value)
    return True
