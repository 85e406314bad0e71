"""Prove what an attention mask lets a query see, by computing it.

Exporters write causal masks in many ways (comparisons of ranges, Trilu, Where over minus infinity, gathers of a
padding mask). The nodes that make the mask read only lengths, positions and the padding mask, so they are run for a
few calls and the result is compared with causal attention, bottom-right aligned, of some window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.graph_passes.infra import integers
from qwenforge.graph_passes.probe import Probe, input_feeds
from qwenforge.graph_passes.signature import Signature
from qwenforge.graph_passes.subgraph import ancestors, evaluate, leaves

_PROBES = (Probe(2, 0, 6), Probe(2, 4, 3), Probe(2, 7, 1), Probe(1, 3, 5), Probe(2, 5, 4, (0, 1)), Probe(2, 0, 5, (4,)))
_LONG_PAST = 140_000
"""Past tokens of the call that measures a window: more than any Qwen2 context."""
_LONG_SQUARE = 1_500
"""The same for a mask that has all keys by all keys on its way, as in a graph without a cache."""
_NO_LIMIT = 2**31 - 1
"""What exporters write for an open end."""
_HIDDEN = -1e3
"""A mask adds less than this to the scores of keys that are not seen: no softmax notices them."""


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
    if _reads_contents(model, mask, signature):
        raise GraphError("the attention mask depends on what the tokens are, not only on how many")
    long = _long_probes(model, mask, signature)
    # Without a padding mask there is nothing to hide a token with.
    probes = [probe for probe in _PROBES if signature.attention_mask is not None or not probe.hidden]
    probes = [*(probe for probe in probes if _expressible(model, probe, signature)), *long]
    if not probes:
        raise GraphError("the graph's fixed input shapes admit no trial of its attention mask")
    visible = {probe: _visible(model, mask, probe, signature) for probe in probes}
    window = _window(mask, visible[long[0]], long[0]) if long else 0
    for probe, shown in visible.items():
        # A query that is itself padding may see anything: its output is never used.
        real = probe.padding_mask()[:, probe.past :].astype(bool)
        if not (shown[real] == _causal(probe, window)[real]).all():
            raise GraphError(
                "the attention mask is not causal: with "
                f"{probe.past} cached and {probe.new} new tokens it shows other keys than the tokens so far"
            )
    return CausalMask(window)


def _expressible(model: ir.Model, probe: Probe, signature: Signature) -> bool:
    """Whether the graph's inputs admit a call of these lengths at all."""
    total = probe.past + probe.new
    sizes: dict[str | None, tuple[int | None, ...]] = {
        signature.input_ids: (probe.batch, probe.new),
        signature.position_ids: (probe.batch, probe.new),
        signature.attention_mask: (probe.batch, total),
    }
    for layer in signature.layers:
        sizes |= dict.fromkeys((layer.key_input, layer.value_input), (probe.batch, None, probe.past, None))
    if probe.past and not signature.has_past:
        return False
    return not any(
        isinstance(have, int) and want not in (None, have)
        for value in model.graph.inputs
        if value.name in sizes and value.shape is not None
        for have, want in zip(value.shape, sizes[value.name], strict=True)
    )


def _visible(model: ir.Model, mask: ir.Value, probe: Probe, signature: Signature) -> npt.NDArray[np.bool_]:
    """The mask as [B, S, past + S] booleans."""
    needed = leaves(ancestors([mask]), [mask])
    feeds = input_feeds(model, probe, needed, signature)
    result = trial([mask], feeds, model.graph.opset_imports[""])[0]
    allowed = result
    if result.dtype != np.bool_:
        added = result.astype(np.float32)
        allowed = added == 0
        if not (allowed | (added < _HIDDEN)).all():
            raise GraphError("the attention mask adds something to the scores of visible keys")
    if allowed.ndim != 4 or allowed.shape[1] != 1:
        raise GraphError(f"the attention mask is {list(allowed.shape)}, not [batch, 1, queries, keys]")
    wanted = (probe.batch, 1, probe.new, probe.past + probe.new)
    if any(have not in (1, want) for have, want in zip(allowed.shape, wanted, strict=True)):
        raise GraphError(f"the attention mask is {list(allowed.shape)} where {list(wanted)} is expected")
    return np.asarray(np.broadcast_to(allowed, wanted)[:, 0])


def _causal(probe: Probe, window: int) -> npt.NDArray[np.bool_]:
    query = probe.past + np.arange(probe.new)[:, None]
    key = np.arange(probe.past + probe.new)[None, :]
    causal = (key <= query) & ((key > query - window) if window else True)
    return np.asarray(causal[None] & probe.padding_mask()[:, None, :].astype(bool))


def _long_probes(model: ir.Model, mask: ir.Value, signature: Signature) -> list[Probe]:
    """Calls that show a window: with two tokens or two lengths, so that a chunk is not taken for one."""
    for batch in (1, 2):
        for new in (2, 1):
            if _expressible(model, Probe(batch, _LONG_PAST, new), signature):
                past = _LONG_SQUARE if _is_square(model, mask, batch, new, signature) else _LONG_PAST
                return [Probe(batch, past, new)] if new > 1 else [Probe(batch, past, 1), Probe(batch, past + 1, 1)]
        if _expressible(model, Probe(batch, 0, _LONG_SQUARE), signature):
            return [Probe(batch, 0, _LONG_SQUARE)]
    return []


def _is_square(model: ir.Model, mask: ir.Value, batch: int, new: int, signature: Signature) -> bool:
    """Whether something on the way to ``mask`` has all keys by all keys, so that a long past takes too much memory."""
    nodes = ancestors([mask])
    values, needed = [value for node in nodes for value in node.outputs], leaves(nodes, [mask])
    sizes = []
    for past in (128, 256):
        feeds = input_feeds(model, Probe(batch, past, new), needed, signature)
        sizes.append([result.size for result in trial(values, feeds, model.graph.opset_imports[""])])
    return any(longer > 3 * shorter for shorter, longer in zip(*sizes, strict=True))


def _window(mask: ir.Value, visible: npt.NDArray[np.bool_], probe: Probe) -> int:
    """Tokens that the last query of a long context sees; 0 when it sees all."""
    if probe.past < _LONG_PAST:
        _refuse_long_windows(mask)
    count = int(visible[0, -1].sum())
    return 0 if count == visible.shape[-1] else count


def _reads_contents(model: ir.Model, mask: ir.Value, signature: Signature) -> bool:
    """Whether ``mask`` reads more of the tokens or the cache than their sizes."""
    caches = {name for layer in signature.layers for name in (layer.key_input, layer.value_input) if name}
    read = {value for value in model.graph.inputs if value.name in caches | {signature.input_ids}}
    for node in ancestors([mask]):
        if node.op_type not in ("Shape", "Size") and any(value in read for value in node.inputs):
            read.update(node.outputs)
    return mask in read


def _refuse_long_windows(mask: ir.Value) -> None:
    """A window beyond the longest trial would pass for none: there is one if the mask knows so large a number."""
    for value in dict.fromkeys(value for node in ancestors([mask]) for value in node.inputs):
        for number in integers(value) or []:
            if _LONG_SQUARE <= abs(number) < _NO_LIMIT:
                raise GraphError(
                    f"the attention mask has the number {number}, perhaps a window, and takes too much memory to be "
                    "tried with so many tokens: export the graph with its cache and a mask of the new tokens only"
                )


def trial(
    values: Sequence[ir.Value], feeds: Mapping[ir.Value, npt.NDArray[np.generic]], opset: int
) -> list[npt.NDArray[np.generic]]:
    """Compute ``values`` as :func:`subgraph.evaluate` does, for sizes that the graph may not be made for.

    Raises:
        GraphError: a value depends on something that is not fed, or cannot be computed for these sizes.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # sums of lowest numbers are infinite, as they may be
            return evaluate(values, feeds, opset)
    except (ValueError, IndexError, TypeError, RuntimeError) as error:
        raise GraphError(
            f"a part of the graph cannot be computed for other lengths than it was exported with: {error}"
        ) from error
