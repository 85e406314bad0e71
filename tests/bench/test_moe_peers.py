"""The peers of the experts' benchmark compute the same layer, as far as a CPU can run them."""

from __future__ import annotations

import pytest
import torch

from qwenforge.bench.kernel_library import Experts
from qwenforge.bench.moe_layers import Call, Layer, reference
from qwenforge.bench.moe_peers import BATCHED_PAIRS, peers
from support.tolerances import BFLOAT16


@pytest.mark.parametrize("layer", [Layer("a", 64, 32, 6, 2, 2), Layer("b", 64, 48, 8, 3, 0, normalize=True)], ids="ab")
@pytest.mark.parametrize("tokens", [1, 17])
def test_peers_agree_with_the_reference(layer: Layer, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale).to(torch.bfloat16)

    gate_up, down = draw(layer.stored, 2 * layer.width, 64, scale=0.125), draw(layer.stored, 64, layer.width, scale=0.2)
    call = Call(draw(tokens, 64), draw(tokens, layer.experts), draw(tokens, 1) if layer.shared else None, 0)
    experts = Experts(gate_up, down, layer.experts, layer.top_k, layer.shared, layer.normalize)
    expected = reference(torch, layer, experts, call)
    found = peers(torch, layer, call.hidden, call.logits, call.gates, gate_up, down)
    assert [*found] == [
        "torch grouped_mm",
        *(f"transformers {n}" for n in ("eager", "batched_mm", "grouped_mm")),
        "triton",
    ]
    for name, peer in found.items():
        if name == "triton":
            continue  # it has no CPU: bench/triton_moe.py is checked with Triton's interpreter, by hand
        assert not isinstance(peer, str), peer
        error = (peer().float() - expected).abs().max() / expected.abs().max()
        assert float(error) < BFLOAT16, name


def test_peer_that_is_not_meant_for_so_many_pairs_says_so() -> None:
    layer = Layer("a", 64, 32, 6, 2, 0)
    tokens = BATCHED_PAIRS // 2 + 1
    made = [torch.zeros(*size) for size in ((tokens, 64), (tokens, 6), (6, 64, 64), (6, 64, 32))]
    found = peers(torch, layer, made[0], made[1], None, made[2], made[3])["transformers batched_mm"]
    assert isinstance(found, str) and "copies the weights of every pair" in found
