"""Layers of experts to be timed: their shapes, weights and routing made on the device, and what bounds their time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qwenforge.bench.kernel_library import ROW_GROUP, Experts


@dataclass(frozen=True)
class Layer:
    """The experts of one layer: C, I, E, K and the shared expert's slices."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int
    shared: int
    normalize: bool = False

    @property
    def stored(self) -> int:
        """E + Es."""
        return self.experts + self.shared

    @property
    def matrices(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.width


LAYERS = (
    Layer("Qwen1.5-MoE-A2.7B", 2048, 1408, 60, 4, 4),
    Layer("Qwen2-57B-A14B", 3584, 2560, 64, 8, 8),
    Layer("Qwen3-30B-A3B", 2048, 768, 128, 8, 0, normalize=True),
)


@dataclass(frozen=True)
class Kind:
    """How weights are stored."""

    name: str
    weight_type: str
    bits: int
    group_size: int = ROW_GROUP


KINDS = (
    Kind("bf16", "float", 16),
    Kind("int8", "int8", 8),
    Kind("int4-128", "int4", 4, 128),
    Kind("int4-64", "int4", 4, 64),
    Kind("fp8", "fp8", 8),
)
ROUTINGS = ("uniform", "skewed")


def make_experts(torch: Any, layer: Layer, kind: Kind) -> Experts:
    """Random weights, packed: the time does not depend on what they are."""
    stored, c, i = layer.stored, layer.hidden, layer.width
    base: dict[str, Any] = {
        "num_experts": layer.experts,
        "top_k": layer.top_k,
        "num_shared": layer.shared,
        "normalize": layer.normalize,
        "weight_type": kind.weight_type,
        "group_size": kind.group_size,
    }
    if kind.weight_type == "float":
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        gate_up = torch.randn(stored, 2 * i, c, **options).mul_(c**-0.5)
        return Experts(gate_up, torch.randn(stored, c, i, **options).mul_(i**-0.5), **base)

    def data(rows: int, columns: int) -> Any:
        made = torch.empty(stored, rows, columns * kind.bits // 8, dtype=torch.int8, device="cuda")
        if kind.weight_type == "fp8":
            for expert in range(stored):
                made[expert] = torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn).view(torch.int8)
            return made
        return made.random_(-128, 128)

    def scales(rows: int, columns: int) -> Any:
        dtype = torch.bfloat16 if kind.weight_type == "int4" else torch.float32
        size = (stored, -(-columns // kind.group_size), rows)
        spread = {"int8": 74.0, "int4": 4.6, "fp8": 1.0}[kind.weight_type]
        return torch.full(size, columns**-0.5 / spread, dtype=dtype, device="cuda")

    activations = torch.full((1 + stored,), 0.01, device="cuda") if kind.weight_type == "fp8" else None
    return Experts(
        data(2 * i, c),
        data(c, i),
        gate_up_scales=scales(2 * i, c),
        down_scales=scales(c, i),
        activation_scales=activations,
        **base,
    )


@dataclass(frozen=True)
class Call:
    """Tokens of one call, bf16: hidden [T, C], logits [T, E], gates [T, 1] or None."""

    hidden: Any
    logits: Any
    gates: Any
    touched: int
    """Stored experts that at least one token goes to."""


def make_call(torch: Any, layer: Layer, tokens: int, routing: str) -> Call:
    """``uniform``: every expert is as likely; ``skewed``: an expert's popularity falls as a power of its rank."""
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    logits = torch.randn(tokens, layer.experts, **options)
    if routing == "skewed":
        logits -= 2 * torch.arange(1, layer.experts + 1, device="cuda").float().log().to(torch.bfloat16)
    chosen = torch.softmax(logits.float(), -1).topk(layer.top_k, -1)[1]
    gates = torch.randn(tokens, 1, **options) if layer.shared else None
    hidden = torch.randn(tokens, layer.hidden, **options)
    return Call(hidden, logits, gates, int(chosen.unique().numel()) + layer.shared)


def floor_us(layer: Layer, kind: Kind, tokens: int, touched: int, bandwidth: float, rate: float) -> tuple[float, str]:
    """The larger of bytes over ``bandwidth`` and operations over ``rate``, in microseconds, and which it is.

    Bytes are the weights and scales of the experts that tokens go to; operations those of all pairs. ``rate`` is the
    bf16 matrix rate, which FP8 doubles.
    """
    scale_bytes = {"float": 0, "int4": 2}.get(kind.weight_type, 4)
    groups = math.ceil(layer.hidden / kind.group_size) * 2 * layer.width
    groups += math.ceil(layer.width / kind.group_size) * layer.hidden
    read = touched * (layer.matrices * kind.bits / 8 + groups * scale_bytes)
    operations = 2.0 * tokens * (layer.top_k + layer.shared) * layer.matrices
    memory = 1e6 * read / bandwidth
    arithmetic = 1e6 * operations / (rate * (2 if kind.weight_type == "fp8" else 1))
    return max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"


def unpacked(torch: Any, experts: Experts, expert: int) -> tuple[Any, Any]:
    """Float32 gate_up [2 I, C] in packed row order, and down [C, I], of one stored expert: for a reference."""

    def widen(data: Any, scales: Any) -> Any:
        match experts.weight_type:
            case "float":
                return data.float()
            case "fp8":
                values = data.view(torch.float8_e4m3fn).float()
            case "int8":
                order = [2 * t + o for t in range(4) for o in (0, 1, 8, 9)]
                blocks = (data.view(torch.uint8).float() - 128).view(data.shape[0], -1, 16)
                values = torch.empty_like(blocks)
                values[..., order] = blocks
                values = values.view(data.shape[0], -1)
            case _:
                pairs = [16 * (p // 2) + 8 * (p % 2) for p in range(4)]
                order = [base + 2 * t + side for t in range(4) for side in range(2) for base in pairs]
                raw = data.view(torch.uint8)
                blocks = (torch.stack([raw & 15, raw >> 4], -1).float() - 8).view(data.shape[0], -1, 32)
                values = torch.empty_like(blocks)
                values[..., order] = blocks
                values = values.view(data.shape[0], -1)
        size = min(experts.group_size, values.shape[1])
        return values * scales.float().repeat_interleave(size, 0)[: values.shape[1]].T

    gate_up_scales, down_scales = (
        None if s is None else s[expert] for s in (experts.gate_up_scales, experts.down_scales)
    )
    return widen(experts.gate_up[expert], gate_up_scales), widen(experts.down[expert], down_scales)


def reference(torch: Any, layer: Layer, experts: Experts, call: Call) -> Any:
    """The layer in fp32, one pair at a time: for a few tokens. FP8 activations are rounded as the kernels do."""
    # Many bf16 logits are equal, and topk takes any of them: the kernels take the lower id.
    ids = call.logits.argsort(dim=-1, descending=True, stable=True)[:, : layer.top_k]
    weights = torch.softmax(call.logits.float(), -1).gather(1, ids)
    if layer.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    scales = experts.activation_scales
    result = torch.zeros_like(call.hidden, dtype=torch.float32)
    for token in range(call.hidden.shape[0]):
        pairs = list(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        if call.gates is not None:
            opened = float(torch.sigmoid(call.gates[token].float()))
            pairs += [(layer.experts + index, opened) for index in range(layer.shared)]
        for expert, weight in pairs:
            gate_up, down = unpacked(torch, experts, expert)
            x = _rounded(torch, call.hidden[token].float(), None if scales is None else scales[0])
            gate, up = (gate_up @ x).view(-1, 2, 8).unbind(1)
            active = (torch.nn.functional.silu(gate) * up).reshape(-1)
            result[token] += weight * (down @ _rounded(torch, active, None if scales is None else scales[1 + expert]))
    return result


def _rounded(torch: Any, values: Any, scale: Any) -> Any:
    if scale is None:
        return values
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
