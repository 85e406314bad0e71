"""Layers of experts in the packed weight formats, and what they compute in float64 PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from qwenforge.plugins.moe.packing import ROW_GROUP, Expert, WeightType, pack_experts, unpack_int4, unpack_int8
from support.tolerances import BFLOAT16, FLOAT8, FLOAT16

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Case:
    """C hidden size, I width, E experts, El local and Es shared ones, K of a token."""

    hidden: int = 64
    width: int = 64
    experts: int = 6
    shared: int = 0
    top_k: int = 2
    normalize: bool = False
    weights: WeightType = WeightType.FLOAT
    group_size: int = ROW_GROUP
    first_local: int = 0
    local: int = 6
    dtype: str = "float16"

    @property
    def tolerance(self) -> float:
        """Of :func:`error`."""
        if self.weights is WeightType.FLOAT8:
            return FLOAT8
        return FLOAT16 if self.dtype == "float16" else BFLOAT16

    @property
    def attributes(self) -> dict[str, int]:
        """As the node has them."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_experts": self.experts,
            "first_local_expert": self.first_local,
            "num_local_experts": self.local,
            "num_shared_experts": self.shared,
            "top_k": self.top_k,
            "normalize_topk": int(self.normalize),
            "weight_type": int(self.weights),
            "group_size": self.group_size,
            "layout_version": 1,
        }


@dataclass(frozen=True)
class Weights:
    """The node's initializers, and the float64 values that they stand for: gate, up [El + Es, I, C], down."""

    tensors: dict[str, np.ndarray]
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @staticmethod
    def random(case: Case, seed: int = 0) -> Weights:
        generator = np.random.default_rng(seed)
        stored, dtype = case.local + case.shared, DTYPES[case.dtype]

        def draw(*shape: int) -> np.ndarray:
            return np.asarray(generator.standard_normal(shape) * shape[-1] ** -0.5, dtype)

        gate, up = draw(stored, case.width, case.hidden), draw(stored, case.width, case.hidden)
        down = draw(stored, case.hidden, case.width)
        experts = (Expert(*one) for one in zip(gate, up, down, strict=True))
        made = list(pack_experts(experts, case.weights, group_size=case.group_size, scale_dtype=dtype))
        parts = {"gate_up_weights": "gate_up", "down_weights": "down"}
        if case.weights is not WeightType.FLOAT:
            parts |= {"gate_up_scales": "gate_up_scales", "down_scales": "down_scales"}
        tensors = {name: np.stack([getattr(one, part) for one in made]) for name, part in parts.items()}
        if case.weights is WeightType.FLOAT8:
            tensors["activation_scales"] = np.linspace(0.008, 0.012, 1 + stored, dtype=np.float32)
        rows = _values(case, tensors["gate_up_weights"], tensors.get("gate_up_scales")).unflatten(1, (-1, 2, 8))
        columns = _values(case, tensors["down_weights"], tensors.get("down_scales"))
        return Weights(tensors, rows[:, :, 0].flatten(1, 2), rows[:, :, 1].flatten(1, 2), columns)


def _values(case: Case, data: np.ndarray, scales: np.ndarray | None) -> torch.Tensor:
    """float64, [stored, rows, columns]."""
    if scales is None:
        return torch.from_numpy(data.astype(np.float64))
    unpack: dict[WeightType, Callable[[np.ndarray], np.ndarray]] = {
        WeightType.INT8: unpack_int8,
        WeightType.INT4: unpack_int4,
        WeightType.FLOAT8: lambda packed: packed.view(ml_dtypes.float8_e4m3fn),
    }
    values = unpack[case.weights](data).astype(np.float64)
    of_column = np.repeat(scales.astype(np.float64), case.group_size, 1)[:, : values.shape[-1]]
    return torch.from_numpy(values * np.swapaxes(of_column, 1, 2))


def feeds(case: Case, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 arrays of numbers that the case's type has."""
    generator = np.random.default_rng(100 + seed)
    widths = {"hidden_states": case.hidden, "router_logits": case.experts}
    widths |= {"shared_gate_logits": 1} if case.shared else {}
    drawn = {f"{name}_float": generator.standard_normal((tokens, width)) for name, width in widths.items()}
    return {name: value.astype(DTYPES[case.dtype]).astype(np.float32) for name, value in drawn.items()}


def reference(case: Case, weights: Weights, given: dict[str, np.ndarray]) -> torch.Tensor:
    """float64 [T, C], one token and one expert at a time."""
    hidden, logits = (torch.from_numpy(given[f"{name}_float"]).double() for name in ("hidden_states", "router_logits"))
    scales = weights.tensors.get("activation_scales")
    result = torch.zeros_like(hidden)
    for token, probabilities in enumerate(torch.softmax(logits, -1)):
        chosen = torch.argsort(probabilities, descending=True, stable=True)[: case.top_k].tolist()
        factor = 1 / float(probabilities[chosen].sum()) if case.normalize else 1.0
        shares = {expert - case.first_local: factor * float(probabilities[expert]) for expert in chosen}
        shares = {expert: share for expert, share in shares.items() if 0 <= expert < case.local}
        for index in range(case.shared):
            shares[case.local + index] = float(torch.sigmoid(torch.tensor(given["shared_gate_logits_float"][token, 0])))
        for expert, share in shares.items():
            x = hidden[token] if scales is None else _float8(hidden[token], scales[0])
            active = torch.nn.functional.silu(weights.gate[expert] @ x) * (weights.up[expert] @ x)
            active = active if scales is None else _float8(active, scales[1 + expert])
            result[token] += share * (weights.down[expert] @ active)
    return result


def _float8(values: torch.Tensor, scale: float) -> torch.Tensor:
    """What is left of ``values`` as E4M3 numbers times ``scale``."""
    return (values / float(scale)).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * float(scale)


def error(found: np.ndarray, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    return float((torch.from_numpy(found).double() - expected).abs().max() / expected.abs().max())
