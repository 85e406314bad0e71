"""Faults planted in an exported ort-cpu model, each of a kind that an exporter can really have."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Fault = Callable[[ir.Model], None]
Array = npt.NDArray[Any]


def plant(model: Path, folder: Path, fault: Fault) -> Path:
    """A copy of ``model`` in ``folder`` with ``fault`` in it; returns the copy's path."""
    copy = ir.load(model)
    fault(copy)
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(copy, folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


def nothing(model: ir.Model) -> None:
    """No fault: that the copying itself changes nothing."""


def element(name: str, value: float) -> Fault:
    """The middle element of the initializer whose name holds ``name`` becomes ``value``."""

    def fault(model: ir.Model) -> None:
        (found,) = [initializer for initializer in model.graph.initializers if name in initializer]

        def change(array: Array) -> Array:
            array[tuple(size // 2 for size in array.shape)] = value
            return array

        _edit(model, found, change)

    return fault


def swapped_layers(model: ir.Model) -> None:
    """The weights of layers 0 and 1 change places."""
    weights = model.graph.initializers
    for name in [name for name in weights if name.startswith("model.layers.0.")]:
        other = re.sub(r"^model\.layers\.0\.", "model.layers.1.", name)
        if other not in weights:  # a constant of the shape computation, shared by the layers
            continue
        weights[name].const_value, weights[other].const_value = weights[other].const_value, weights[name].const_value


def swapped_experts(model: ir.Model) -> None:
    """In layer 1, experts 0 and 1 change places; the router does not know."""
    for name in [name for name in model.graph.initializers if name.startswith("model.layers.1.mlp.experts.")]:
        _edit(model, name, lambda array: array[[1, 0, *range(2, len(array))]])


def attribute(operators: tuple[str, ...], name: str, value: float) -> Fault:
    """Every node of ``operators`` has ``value`` for its attribute ``name``."""

    def fault(model: ir.Model) -> None:
        nodes = [node for node in model.graph if node.op_type in operators]
        assert nodes
        for node in nodes:
            kind = node.attributes[name].type
            node.attributes[name] = ir.Attr(name, kind, value)

    return fault


def rope_theta(theta: float) -> Fault:
    """The rotary tables are those of another base."""

    def fault(model: ir.Model) -> None:
        for function, table in ((np.cos, "rope.cos_cache"), (np.sin, "rope.sin_cache")):
            (name,) = [name for name in model.graph.initializers if name.startswith(table)]

            def compute(array: Array, function: Any = function) -> Array:
                positions, half = array.shape
                frequencies = theta ** -(np.arange(half) / half)
                computed: Array = function(np.arange(positions)[:, None] * frequencies)
                return computed.astype(array.dtype)

            _edit(model, name, compute)

    return fault


def _edit(model: ir.Model, name: str, change: Callable[[Array], Array]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = change(np.array(value.const_value.numpy()))
    value.const_value = ir.Tensor(np.ascontiguousarray(array), dtype=value.const_value.dtype, name=name)
