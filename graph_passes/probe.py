"""Feeds for the part of a graph that depends on positions and lengths but not on weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.graph_passes.signature import Signature, detect_signature


@dataclass(frozen=True)
class Probe:
    """Lengths of a trial call: ``batch`` rows with ``past`` cached and ``new`` fresh tokens.

    ``hidden`` marks cached or fresh tokens, by their index in past + new, that the padding mask hides in row 0.
    """

    batch: int
    past: int
    new: int
    hidden: tuple[int, ...] = ()

    def padding_mask(self) -> npt.NDArray[np.int64]:
        """attention_mask [B, past + new]: 1 for visible tokens."""
        mask = np.ones((self.batch, self.past + self.new), np.int64)
        mask[0, list(self.hidden)] = 0
        return mask


def input_feeds(
    model: ir.Model, probe: Probe, wanted: Sequence[ir.Value], signature: Signature | None = None
) -> dict[ir.Value, npt.NDArray[np.generic]]:
    """Arrays for those graph inputs among ``wanted``; a cache is zeros of the right length.

    Raises:
        GraphError: an input has no known role, or its static shape does not admit the probe.
    """
    signature = signature or detect_signature(model)
    caches = {name for layer in signature.layers for name in (layer.key_input, layer.value_input) if name}
    feeds: dict[ir.Value, npt.NDArray[np.generic]] = {}
    for value in wanted:
        if not value.is_graph_input() or value.shape is None or value.dtype is None:
            raise GraphError(f"positions or mask depend on {value.name}, which is not a graph input")
        if value.name == signature.input_ids:
            array: npt.NDArray[np.generic] = np.zeros((probe.batch, probe.new), np.int64)
        elif value.name == signature.position_ids:
            array = np.tile(probe.past + np.arange(probe.new), (probe.batch, 1))
        elif value.name == signature.attention_mask:
            array = probe.padding_mask()
        elif value.name in caches:
            heads, size = value.shape[1], value.shape[3]
            if not isinstance(heads, int) or not isinstance(size, int):
                raise GraphError(f"cache input {value.name} has no static head count and head size")
            array = np.zeros((probe.batch, heads, probe.past, size), value.dtype.numpy())
        else:
            raise GraphError(f"positions or mask depend on the graph input {value.name}, whose role is unknown")
        for have, want in zip(array.shape, value.shape, strict=True):
            if isinstance(want, int) and want != have:
                raise GraphError(f"graph input {value.name} has the fixed shape {value.shape}")
        feeds[value] = array.astype(value.dtype.numpy())
    if probe.past and not caches:
        raise GraphError("the graph takes no cache")
    return feeds
