"""One call of the experts' kernels in the emulator: shapes, inputs, packed weights and the answer in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch

from qwenforge.plugins.moe.packing import ROW_GROUP, Expert, WeightType, pack_experts, unpack_int4, unpack_int8
from support import simt
from support.tolerances import BFLOAT16, FLOAT16

DTYPES = {"float16": (torch.float16, FLOAT16), "bfloat16": (torch.bfloat16, BFLOAT16)}


@dataclass(frozen=True)
class Shape:
    """T tokens, C hidden size, I intermediate size, E experts, El local and Es shared ones, K of a token."""

    tokens: int = 5
    hidden: int = 64
    width: int = 32
    experts: int = 8
    shared: int = 0
    top_k: int = 2
    normalize: bool = False
    path: int = 0
    weight_type: WeightType = WeightType.FLOAT
    group_size: int = ROW_GROUP
    first_local: int = 0
    local: int | None = None
    """All of them if None."""

    @property
    def stored(self) -> int:
        """El + Es."""
        return (self.experts if self.local is None else self.local) + self.shared

    @property
    def numbers(self) -> list[float]:
        """As the driver takes them."""
        routed = [self.experts, self.first_local, self.stored - self.shared, self.shared, self.top_k, self.normalize]
        return [self.tokens, self.hidden, self.width, *routed, self.weight_type, self.group_size, self.path]


@dataclass(frozen=True, eq=False)
class Inputs:
    """hidden [T, C], logits [T, E], gate and up [E + Es, I, C], down [E + Es, C, I], gates [T, 1]."""

    hidden: torch.Tensor
    logits: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gates: torch.Tensor

    @staticmethod
    def random(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int, scale: float) -> torch.Tensor:
            return (torch.randn(size, generator=generator) * scale).to(dtype)

        stored = shape.experts + shape.shared
        return Inputs(
            hidden=draw(shape.tokens, shape.hidden, scale=1.0),
            logits=draw(shape.tokens, shape.experts, scale=2.0),
            gate=draw(stored, shape.width, shape.hidden, scale=shape.hidden**-0.5),
            up=draw(stored, shape.width, shape.hidden, scale=shape.hidden**-0.5),
            down=draw(stored, shape.hidden, shape.width, scale=shape.width**-0.5),
            gates=draw(shape.tokens, 1, scale=1.0),
        )


@dataclass(frozen=True)
class Packed:
    """What the kernels get of the weights, and the float64 values that stands for: gate_up [stored, 2 I, C], down."""

    tensors: list[np.ndarray]
    gate_up: torch.Tensor
    down: torch.Tensor
    activation_scales: torch.Tensor | None


def _packed(shape: Shape, inputs: Inputs) -> Packed:
    return _pack_once(replace(shape, path=0, tokens=0), inputs)


@functools.lru_cache(maxsize=4)
def _pack_once(shape: Shape, inputs: Inputs) -> Packed:
    local = [*range(shape.first_local, shape.first_local + shape.stored - shape.shared)]
    kept = [*local, *range(shape.experts, shape.experts + shape.shared)]
    gate, up, down = (value[kept] for value in (inputs.gate, inputs.up, inputs.down))
    rows = torch.stack([gate.unflatten(1, (-1, 8)), up.unflatten(1, (-1, 8))], 2).flatten(1, 3)
    if shape.weight_type is WeightType.FLOAT:
        return Packed([_bits(rows), _bits(down)], rows.double(), down.double(), None)
    scales_as = ml_dtypes.bfloat16 if gate.dtype == torch.bfloat16 else np.float16
    experts = (Expert(*(value.float().numpy() for value in one)) for one in zip(gate, up, down, strict=True))
    made = list(pack_experts(experts, shape.weight_type, group_size=shape.group_size, scale_dtype=scales_as))
    tensors, values = [], []
    for part in ("gate_up", "down"):
        data, scales = (np.stack([getattr(one, name) for one in made]) for name in (part, f"{part}_scales"))
        tensors.append((data, scales))
        values.append(_dequantized(shape, data, scales))
    activations = None
    if shape.weight_type is WeightType.FLOAT8:
        activations = torch.linspace(0.008, 0.012, 1 + shape.stored)
    arrays = [data for data, _ in tensors] + [scales for _, scales in tensors]
    return Packed(arrays, values[0], values[1], activations)


def _dequantized(shape: Shape, data: np.ndarray, scales: np.ndarray) -> torch.Tensor:
    match shape.weight_type:
        case WeightType.INT8:
            values = unpack_int8(data).astype(np.float64)
        case WeightType.INT4:
            values = unpack_int4(data).astype(np.float64)
        case _:
            values = data.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    of_column = np.repeat(scales.astype(np.float64), min(shape.group_size, values.shape[-1]), 1)[:, : values.shape[-1]]
    return torch.from_numpy(values * np.swapaxes(of_column, 1, 2))


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy()


def reference(shape: Shape, inputs: Inputs) -> torch.Tensor:
    """float64, one token and one expert at a time, with the weights that the packed ones stand for."""
    packed = _packed(shape, inputs)
    split = packed.gate_up.unflatten(1, (-1, 2, 8))
    gate, up = split[:, :, 0].flatten(1, 2), split[:, :, 1].flatten(1, 2)
    hidden, down, scales = inputs.hidden.double(), packed.down, packed.activation_scales
    probabilities = torch.softmax(inputs.logits.double(), -1)
    result = torch.zeros(shape.tokens, shape.hidden, dtype=torch.float64)
    for token in range(shape.tokens):
        # The lower id where two are equal: a stable sort in falling order.
        order = torch.argsort(probabilities[token], descending=True, stable=True)[: shape.top_k].tolist()
        weights = {expert: float(probabilities[token, expert]) for expert in order}
        if shape.normalize:
            total = sum(weights.values())
            weights = {expert: weight / total for expert, weight in weights.items()}
        local = {expert - shape.first_local: weight for expert, weight in weights.items()}
        local = {expert: weight for expert, weight in local.items() if 0 <= expert < shape.stored - shape.shared}
        opened = float(torch.sigmoid(inputs.gates[token, 0].double()))
        local |= {shape.stored - shape.shared + index: opened for index in range(shape.shared)}
        for expert, weight in local.items():
            x = hidden[token] if scales is None else _float8(hidden[token], scales[0])
            active = torch.nn.functional.silu(gate[expert] @ x) * (up[expert] @ x)
            if scales is not None:
                active = _float8(active, scales[1 + expert])
            result[token] += weight * (down[expert] @ active)
    return result


def _float8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What is left of ``values`` as E4M3 numbers times ``scale``."""
    quantized = (values / scale.double()).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return quantized.double() * scale.double()


def run(shape: Shape, inputs: Inputs, dtype: str, **options: Any) -> torch.Tensor:
    packed = _packed(shape, inputs)
    arrays = [_bits(inputs.hidden), _bits(inputs.logits), *packed.tensors[:2]]
    if shape.shared:
        arrays.append(_bits(inputs.gates))
    arrays += packed.tensors[2:]
    if packed.activation_scales is not None:
        arrays.append(packed.activation_scales.numpy())
    raw = simt.run("moe", dtype, shape.numbers, arrays, **options)
    flat = torch.from_numpy(np.frombuffer(raw, np.int16).copy()).view(DTYPES[dtype][0])
    return flat.view(shape.tokens, shape.hidden)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    return float((found.double() - expected).abs().max() / expected.abs().max())
