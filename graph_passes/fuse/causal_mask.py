"""Prove what an attention mask lets a query see, by computing it.

Exporters write causal masks in many ways (comparisons of ranges, Trilu, Where over minus infinity, gathers of a
padding mask). The nodes that make the mask read only lengths, positions and the padding mask, so they are run for a
few calls and the result is compared with causal attention, bottom-right aligned, of some window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.graph_passes.probe import Probe, input_feeds
from qwenforge.graph_passes.signature import Signature
from qwenforge.graph_passes.subgraph import ancestors, evaluate, leaves

_PROBES = (Probe(2, 0, 6), Probe(2, 4, 3), Probe(2, 7, 1), Probe(1, 3, 5), Probe(2, 5, 4, (0, 1)), Probe(2, 0, 5, (4,)))
_LONG_PAST = 140_000
"""Past tokens of the call that measures a window: more than any Qwen2 context."""
_LONG_PREFILL = 1_500
"""The same for a graph without a cache, whose mask is quadratic."""


@dataclass(frozen=True)
class CausalMask:
    """A proven mask: a query sees itself and the ``sliding_window - 1`` tokens before it; 0 means all of them."""

    sliding_window: int


def prove_causal(model: ir.Model, mask: ir.Value, signature: Signature) -> CausalMask:
    """Evaluate ``mask`` (bool, or added to the scores) and say which causal mask it is.

    Raises:
        GraphError: it is not causal, or depends on something other than lengths, positions and the padding mask.
    """
    if mask.const_value is not None:
        raise GraphError("the attention mask is a constant, which cannot be causal for every length")
    window = _window(model, mask, signature)
    shown = 0
    for probe in _PROBES:
        try:
            visible = _visible(model, mask, probe, signature)
        except GraphError:
            if not _expressible(model, probe, signature):
                continue
            raise
        expected = _causal(probe, window)
        # A query that is itself padding may see anything: its output is never used.
        real = probe.padding_mask()[:, probe.past :].astype(bool)
        if signature.attention_mask is None and probe.hidden:
            continue
        seen = np.broadcast_to(visible, expected.shape)
        if not (seen[real] == expected[real]).all():
            raise GraphError(
                "the attention mask is not causal: with "
                f"{probe.past} cached and {probe.new} new tokens it shows other keys than the tokens so far"
            )
        shown += 1
    if not shown:
        raise GraphError("the graph's fixed input shapes admit no trial of its attention mask")
    return CausalMask(window)


def _expressible(model: ir.Model, probe: Probe, signature: Signature) -> bool:
    """Whether the graph's inputs admit a call of these lengths at all."""
    try:
        input_feeds(model, probe, [value for value in model.graph.inputs if _has_role(value, signature)], signature)
    except GraphError:
        return False
    return True


def _has_role(value: ir.Value, signature: Signature) -> bool:
    caches = {name for layer in signature.layers for name in (layer.key_input, layer.value_input)}
    return value.name in caches | {signature.input_ids, signature.attention_mask, signature.position_ids}


def _visible(model: ir.Model, mask: ir.Value, probe: Probe, signature: Signature) -> npt.NDArray[np.bool_]:
    """The mask as [B or 1, S, past + S] booleans."""
    needed = leaves(ancestors([mask]), [mask])
    feeds = input_feeds(model, probe, needed, signature)
    result = evaluate([mask], feeds, model.graph.opset_imports[""])[0]
    allowed = result if result.dtype == np.bool_ else result.astype(np.float32) > -1e3
    if allowed.ndim != 4 or allowed.shape[1] != 1:
        raise GraphError(f"the attention mask is {list(allowed.shape)}, not [batch, 1, queries, keys]")
    return np.asarray(allowed[:, 0])


def _causal(probe: Probe, window: int) -> npt.NDArray[np.bool_]:
    query = probe.past + np.arange(probe.new)[:, None]
    key = np.arange(probe.past + probe.new)[None, :]
    causal = (key <= query) & ((key > query - window) if window else True)
    return np.asarray(causal[None] & probe.padding_mask()[:, None, :].astype(bool))


def _window(model: ir.Model, mask: ir.Value, signature: Signature) -> int:
    """Tokens that the last query of a long context sees; 0 when it sees all."""
    for probe in (
        Probe(1, _LONG_PAST, 1),
        Probe(2, _LONG_PAST, 1),
        Probe(1, 0, _LONG_PREFILL),
        Probe(2, 0, _LONG_PREFILL),
    ):
        if _expressible(model, probe, signature):
            visible = _visible(model, mask, probe, signature)[0, -1]
            count = int(visible.sum())
            return 0 if count == visible.size else count
    return 0
