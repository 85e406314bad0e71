"""The experts' kernels, run on the CPU by the emulator, against float64 PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from support import simt
from support.tolerances import BFLOAT16, FLOAT16

pytestmark = pytest.mark.skipif(bool(simt.why_missing()), reason=simt.why_missing() or "-")

DTYPES = {"float16": (torch.float16, FLOAT16), "bfloat16": (torch.bfloat16, BFLOAT16)}


@dataclass(frozen=True)
class Shape:
    """T tokens, C hidden size, I intermediate size, E experts, Es shared ones, K of a token."""

    tokens: int = 5
    hidden: int = 64
    width: int = 32
    experts: int = 8
    shared: int = 0
    top_k: int = 2
    normalize: bool = False
    path: int = 0
    """0: plain, 1: matrix instructions."""

    @property
    def numbers(self) -> list[float]:
        """As the driver takes them."""
        return [self.tokens, self.hidden, self.width, self.experts, self.shared, self.top_k, self.normalize, self.path]


@dataclass(frozen=True)
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

    def packed(self) -> torch.Tensor:
        """[E + Es, 2 I, C], 8 rows of the gate and then the 8 of up, written from the layout's description."""
        stored, width, hidden = self.gate.shape
        tiles = torch.stack(
            [self.gate.view(stored, width // 8, 8, hidden), self.up.view(stored, width // 8, 8, hidden)], 2
        )
        return tiles.reshape(stored, 2 * width, hidden)


def _reference(shape: Shape, inputs: Inputs) -> torch.Tensor:
    """float64, one token and one expert at a time."""
    hidden, gate, up, down = (value.double() for value in (inputs.hidden, inputs.gate, inputs.up, inputs.down))
    probabilities = torch.softmax(inputs.logits.double(), -1)
    result = torch.zeros(shape.tokens, shape.hidden, dtype=torch.float64)
    for token in range(shape.tokens):
        # The lower id where two are equal: a stable sort in falling order.
        order = torch.argsort(probabilities[token], descending=True, stable=True)[: shape.top_k].tolist()
        weights = {expert: float(probabilities[token, expert]) for expert in order}
        if shape.normalize:
            total = sum(weights.values())
            weights = {expert: weight / total for expert, weight in weights.items()}
        opened = float(torch.sigmoid(inputs.gates[token, 0].double()))
        weights |= {shape.experts + index: opened for index in range(shape.shared)}
        for expert, weight in weights.items():
            x = hidden[token]
            active = torch.nn.functional.silu(gate[expert] @ x) * (up[expert] @ x)
            result[token] += weight * (down[expert] @ active)
    return result


def _run(shape: Shape, inputs: Inputs, dtype: str, **options: Any) -> torch.Tensor:
    tensors = [inputs.hidden, inputs.logits, inputs.packed(), inputs.down]
    if shape.shared:
        tensors.append(inputs.gates)
    arrays = [tensor.contiguous().view(torch.int16).numpy() for tensor in tensors]
    raw = simt.run("moe", dtype, shape.numbers, arrays, **options)
    flat = torch.from_numpy(np.frombuffer(raw, np.int16).copy()).view(DTYPES[dtype][0])
    return flat.view(shape.tokens, shape.hidden)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


PATHS = {"plain": 0, "matrix": 1}
SHAPES = {
    "plain": Shape(),
    "one token": Shape(tokens=1),
    "17 tokens": Shape(tokens=17, normalize=True),
    "smallest sizes": Shape(hidden=8, width=8, experts=1, top_k=1),
    "odd sizes": Shape(tokens=7, hidden=72, width=24, experts=5, top_k=3),
    "wider than a tile": Shape(tokens=3, hidden=200, width=136, experts=3, top_k=2),
    "more pairs than a tile": Shape(tokens=40, hidden=16, width=16, experts=2, top_k=2, normalize=True),
    "one expert takes all": Shape(tokens=70, hidden=16, width=8, experts=1, top_k=1),
    "shared expert": Shape(tokens=9, shared=1),
    "four shared slices": Shape(tokens=6, hidden=40, width=40, experts=6, shared=4, top_k=2, normalize=True),
    "64 experts, top 8": Shape(tokens=11, hidden=32, width=16, experts=64, top_k=8, normalize=True),
    "60 experts, top 4, shared 4": Shape(tokens=4, hidden=32, width=16, experts=60, shared=4, top_k=4),
    "256 experts, top 8": Shape(tokens=3, hidden=16, width=8, experts=256, top_k=8),
    "33 experts": Shape(tokens=4, hidden=16, width=8, experts=33, top_k=8, normalize=True),
    "many tokens of one expert": Shape(tokens=150, hidden=40, width=24, experts=2, top_k=1),
    "two chunks": Shape(tokens=515, hidden=8, width=8, experts=3, top_k=1, shared=1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SHAPES)
def test_experts_agree_with_float64(name: str, path: str, dtype: str) -> None:
    shape = replace(SHAPES[name], path=PATHS[path])
    inputs = Inputs.random(shape, DTYPES[dtype][0], seed=len(name))
    assert _error(_run(shape, inputs, dtype), _reference(shape, inputs)) < DTYPES[dtype][1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["odd sizes", "four shared slices", "256 experts, top 8", "more pairs than a tile"])
def test_nothing_outside_the_tensors_is_touched(name: str, path: str) -> None:
    shape = replace(SHAPES[name], path=PATHS[path])
    inputs = Inputs.random(shape, torch.bfloat16, seed=1)
    assert _error(_run(shape, inputs, "bfloat16", checked=True), _reference(shape, inputs)) < BFLOAT16


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["17 tokens", "four shared slices", "33 experts"])
def test_every_order_of_threads_gives_the_same_bits(name: str, path: str) -> None:
    shape = replace(SHAPES[name], path=PATHS[path])
    inputs = Inputs.random(shape, torch.float16, seed=2)
    first, *others = (_run(shape, inputs, "float16", schedule=number) for number in (0, 1, 2, 3))
    assert all(torch.equal(first, other) for other in others)


def test_no_token_is_no_work() -> None:
    shape = Shape(tokens=0)
    assert _run(shape, Inputs.random(shape, torch.float16), "float16").shape == (0, shape.hidden)


def test_experts_without_a_token_and_one_with_all_of_them() -> None:
    shape = Shape(tokens=37, experts=6, top_k=1)
    inputs = Inputs.random(shape, torch.float16, seed=3)
    inputs.logits[:] = 0
    inputs.logits[:, 4] = 20
    assert _error(_run(shape, inputs, "float16"), _reference(shape, inputs)) < FLOAT16


def test_of_equal_logits_the_lower_ids_are_chosen() -> None:
    shape = Shape(tokens=3, experts=70, top_k=4)
    inputs = Inputs.random(shape, torch.bfloat16, seed=4)
    inputs.logits[0] = 0.5
    inputs.logits[1] = torch.tensor([0.0, 1.0] * 35)
    inputs.logits[2, 10:60] = 9
    assert _error(_run(shape, inputs, "bfloat16"), _reference(shape, inputs)) < BFLOAT16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["hidden", "logits", "gates"])
def test_nan_and_infinity_stay_in_their_token(where: str, value: float) -> None:
    """They come out of their own token, hang nothing, and no other token notices."""
    shape = Shape(tokens=6, experts=9, top_k=3, shared=1, normalize=True)
    inputs = Inputs.random(shape, torch.float16, seed=5)
    clean = _run(shape, inputs, "float16")
    getattr(inputs, where)[2, 0] = value
    found = _run(shape, inputs, "float16", checked=True)
    rows = torch.arange(shape.tokens) != 2
    assert torch.equal(found[rows], clean[rows])
    if value != value or where == "hidden":
        assert not torch.isfinite(found[2]).any()


def test_a_row_of_nan_logits_is_nan() -> None:
    shape = Shape(tokens=4, experts=33, top_k=8)
    inputs = Inputs.random(shape, torch.bfloat16, seed=6)
    inputs.logits[1] = float("nan")
    found = _run(shape, inputs, "bfloat16", checked=True)
    assert torch.isnan(found[1]).all() and torch.isfinite(found[[0, 2, 3]]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 12},
        {"width": 4},
        {"experts": 257, "top_k": 2},
        {"top_k": 9},
        {"top_k": 5, "experts": 4},
        {"shared": 65},
    ],
    ids=str,
)
def test_size_that_is_not_supported_is_an_error_and_computes_nothing(change: dict[str, int]) -> None:
    shape = replace(Shape(tokens=2), **change)
    padded = replace(shape, width=max(shape.width, 8))
    inputs = Inputs.random(padded, torch.float16)
    tensors = [inputs.hidden, inputs.logits, inputs.gate, inputs.up, inputs.down, inputs.down, inputs.gates]
    arrays = [tensor.contiguous().view(torch.int16).numpy() for tensor in tensors]
    with pytest.raises(simt.KernelError, match=r"^exit code 1: $"):
        simt.run("moe", "float16", shape.numbers, arrays)


@pytest.mark.parametrize("normalize", [False, True])
def test_block_of_transformers_is_computed(normalize: bool) -> None:
    """Its own Qwen2MoeSparseMoeBlock in float64, shared expert and router included."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    shape = Shape(tokens=12, hidden=64, width=24, experts=10, shared=2, top_k=4, normalize=normalize)
    config = Qwen2MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        shared_expert_intermediate_size=shape.shared * shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=normalize,
    )
    torch.manual_seed(7)
    block = Qwen2MoeSparseMoeBlock(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            # Representable in 16 bits, so that both sides have the very same weights.
            parameter.copy_((torch.randn_like(parameter) * parameter.shape[-1] ** -0.5).half().float())
        block = block.double()
        hidden = torch.randn(1, shape.tokens, shape.hidden).half()
        answer = block(hidden.double())
        expected = (answer[0] if isinstance(answer, tuple) else answer)[0]
        router = (hidden[0].double() @ block.gate.weight.T).half()
        gates = (hidden[0].double() @ block.shared_expert_gate.weight.T).half()
    routed = block.experts.gate_up_proj.half()
    shared = block.shared_expert
    gate = torch.cat([routed[:, : shape.width], shared.gate_proj.weight.half().view(shape.shared, shape.width, -1)])
    up = torch.cat([routed[:, shape.width :], shared.up_proj.weight.half().view(shape.shared, shape.width, -1)])
    columns = shared.down_proj.weight.half().view(shape.hidden, shape.shared, shape.width).transpose(0, 1)
    down = torch.cat([block.experts.down_proj.half(), columns])
    found = _run(shape, Inputs(hidden[0], router, gate, up, down, gates), "float16")
    assert _error(found, expected.detach()) < FLOAT16
