"""Stacked weights of experts taken one by one, so that memory never holds more than one of them."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qwenforge.exporter import weights
from qwenforge.exporter.transforms import Cast, Stack


def each_expert(
    stacked: ir.TensorProtocol, function: Callable[[ir.TensorProtocol, int], ir.TensorProtocol]
) -> ir.TensorProtocol:
    """``stacked`` [E, ...] with every expert [...] replaced by ``function(expert, index)``, as a lazy stack."""
    experts = experts_of(stacked)
    return weights.stack([function(expert, index) for index, expert in enumerate(experts)], 0)


def experts_of(stacked: ir.TensorProtocol) -> list[ir.TensorProtocol]:
    """The experts [...] of ``stacked`` [E, ...], each a lazy plan of its own."""
    if isinstance(stacked, weights.DerivedTensor):
        match stacked.transform:
            case Stack(0):
                return list(stacked.sources)
            case Cast(to):
                return [weights.cast(expert, to) for expert in experts_of(stacked.sources[0])]
    count, *rest = weights.dims(stacked)
    return [weights.reshape(weights.slice_(stacked, 0, index, index + 1), rest) for index in range(count)]
