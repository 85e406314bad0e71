"""Others that compute a layer of experts, from the router's logits on: what ``bench/kernels.py`` compares with.

Peers get the same weights; what they need in another order is made beforehand. A peer that cannot run is a sentence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from qwenforge.bench.moe_layers import Layer

Peer = Callable[[], Any] | str
BATCHED_PAIRS = 512
"""transformers' batched_mm copies the weights of every pair: beyond so many it is not meant to be used."""


def peers(torch: Any, layer: Layer, x: Any, logits: Any, gates: Any, gate_up: Any, down: Any) -> dict[str, Peer]:
    """Every peer by name: a call that gives [T, C], or the reason why it cannot run here.

    x [T, C], logits [T, E], gates [T, 1] or None; gate_up [E + Es, 2 I, C] with rows as our kernels have them, down
    [E + Es, C, I]. A call with an attribute ``graph`` that is False waits for the device, and cannot be captured.
    """

    def routed() -> tuple[Any, Any]:
        return route(torch, layer, logits, gates)

    rows = separated(torch, gate_up)
    found: dict[str, Peer] = {"torch grouped_mm": _grouped(torch, layer, x, gate_up, down, routed)}
    for name in ("eager", "batched_mm", "grouped_mm"):
        found[f"transformers {name}"] = _transformers(torch, layer, name, x, rows, down, routed)
    found["triton"] = _triton(x, rows, down, routed)
    return found


def route(torch: Any, layer: Layer, logits: Any, gates: Any) -> tuple[Any, Any]:
    """Stored expert [T, S] and weight [T, S], fp32, of every slot; the shared experts' slots are the last."""
    weights, ids = torch.softmax(logits.float(), -1).topk(layer.top_k, -1)
    if layer.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if layer.shared:
        extra = torch.arange(layer.experts, layer.stored, device=logits.device).expand(logits.shape[0], -1)
        ids = torch.cat([ids, extra], 1)
        weights = torch.cat([weights, torch.sigmoid(gates.float()).expand(-1, layer.shared)], 1)
    return ids, weights


def separated(torch: Any, gate_up: Any) -> Any:
    """The same rows, the gate's first and then up's."""
    stored, rows, hidden = gate_up.shape
    return gate_up.view(stored, rows // 16, 2, 8, hidden).transpose(1, 2).reshape(stored, rows, hidden)


def _grouped(torch: Any, layer: Layer, x: Any, gate_up: Any, down: Any, routed: Callable[[], Any]) -> Peer:
    multiply = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if multiply is None:
        return "this torch has no grouped_mm"
    if x.is_cuda and torch.cuda.get_device_capability() < (8, 0):
        return "grouped_mm needs SM 80"

    def call() -> Any:
        ids, weights = routed()
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(layer.stored, dtype=torch.int32, device=x.device)
        counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        ends = counts.cumsum(0).to(torch.int32)
        both = multiply(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=ends)
        gate, up = both.view(-1, layer.width // 8, 2, 8).unbind(2)
        active = (torch.nn.functional.silu(gate) * up).reshape(-1, layer.width)
        partial = multiply(active, down.transpose(1, 2), offs=ends)
        placed = torch.empty_like(partial)
        placed[order] = partial
        weighted = placed.view(*ids.shape, -1).float() * weights[..., None]
        return weighted.sum(1).to(x.dtype)

    return call


def _transformers(torch: Any, layer: Layer, name: str, x: Any, rows: Any, down: Any, routed: Callable[[], Any]) -> Peer:
    try:
        from transformers import Qwen2MoeConfig
        from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
    except ImportError as error:
        return f"transformers has no Qwen2MoeExperts here: {error}"
    if name == "batched_mm" and x.shape[0] * (layer.top_k + layer.shared) > BATCHED_PAIRS:
        return f"batched_mm copies the weights of every pair: more than {BATCHED_PAIRS} pairs"
    config = Qwen2MoeConfig(
        hidden_size=layer.hidden, moe_intermediate_size=layer.width, num_experts=layer.stored, hidden_act="silu"
    )
    config._experts_implementation = name
    with torch.device("meta"):
        experts = Qwen2MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(rows, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(down, requires_grad=False)

    def call() -> Any:
        ids, weights = routed()
        with torch.no_grad():
            return experts(x, ids, weights.to(x.dtype))

    call.graph = name != "eager"  # type: ignore[attr-defined]
    return call


def _triton(x: Any, rows: Any, down: Any, routed: Callable[[], Any]) -> Peer:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from qwenforge.bench.triton_moe import fused_experts

    def call() -> Any:
        ids, weights = routed()
        return fused_experts(x, ids, weights, rows, down)

    return call
