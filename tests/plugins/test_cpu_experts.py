"""QuantizedMixtureOfExperts in ONNX Runtime, with each instruction set, against transformers' block in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from support.cpu_mixture_case import EPSILON, Form, MixtureCase
from support.cpu_reference import exact_mlp, mlp, normalized
from support.cpu_runs import Answer, Job
from support.tolerances import FLOAT32_EXACT, INT8_ACTIVATIONS

OTHER = Form(80, 8, 16, 4, 64)
CASES = {
    "one token": MixtureCase(),
    "one token, k = 1": MixtureCase(k=1, normalize=False),
    "one token, k = 4, not normalized": MixtureCase(k=4, normalize=False),
    "one token, all experts": MixtureCase(experts=3, k=3),
    "one token, many experts": MixtureCase(experts=21, k=4),
    "one token, shared": MixtureCase(shared=Form(72)),
    "one token, shared of another form": MixtureCase(shared=OTHER, k=3, normalize=False),
    "one token, equal logits": MixtureCase(logits="equal", k=3),
    "one token, norm": MixtureCase(norm=True, shared=Form(64)),
    "one token, sum": MixtureCase(residual=True, norm=True, wants_sum=True, shared=Form(40, 4, 32, 8, 16)),
    "3 tokens": MixtureCase(tokens=3),
    "3 tokens, all for one": MixtureCase(tokens=3, k=1, logits="all for one"),
    "3 tokens, shared": MixtureCase(tokens=3, leading=(1, 3), shared=OTHER, k=2, experts=4, zero_points=True),
    "4 tokens, int8": MixtureCase(
        tokens=4, leading=(2, 2), routed=Form(48, 8, 16, 8, 128), residual=True, half_scales=False
    ),
    "5 tokens": MixtureCase(tokens=5, k=3, normalize=False),
    "5 tokens, shared": MixtureCase(tokens=5, shared=Form(200, 4, 128, 4, 16), residual=True, wants_sum=True),
    "5 tokens, equal logits": MixtureCase(tokens=5, logits="equal", k=2, normalize=False),
    "5 tokens, all for one": MixtureCase(tokens=5, k=1, logits="all for one", shared=Form(32)),
    "5 tokens, int8 and int4": MixtureCase(tokens=5, routed=Form(33, 8, 64, 4, 16), hidden=100, zero_points=True),
    "64 tokens": MixtureCase(tokens=64, leading=(2, 32)),
    "64 tokens, k = 4": MixtureCase(tokens=64, experts=8, k=4, normalize=False, shared=OTHER, hidden=128),
    "64 tokens, all for one": MixtureCase(tokens=64, k=2, logits="all for one", shared=Form(64, 8, 32, 8, 32)),
    "64 tokens, norm": MixtureCase(
        tokens=64, leading=(4, 16), norm=True, residual=True, wants_sum=True, shared=Form(64)
    ),
    "64 tokens of odd widths": MixtureCase(tokens=64, hidden=77, routed=Form(45, 4, 16, 8, 16), zero_points=True),
    "wide, one token": MixtureCase(hidden=1100, routed=Form(1100), shared=Form(600), experts=3),
    "wide, 6 tokens": MixtureCase(tokens=6, hidden=1100, routed=Form(300), shared=Form(600), experts=3),
}
NAN = {
    "nan in few tokens": MixtureCase(tokens=3, shared=Form(64)),
    "nan in many tokens": MixtureCase(tokens=7, shared=Form(64)),
}
_SPOILED = 1


def _spoiled(case: MixtureCase, value: float) -> Job:
    job = case.job((2,))
    values = job.feeds["values"].copy()
    values[_SPOILED, 40] = value
    return replace(job, feeds={"values": values})


JOBS = {
    **{name: case.job() for name, case in CASES.items()},
    **{name: _spoiled(case, np.nan) for name, case in NAN.items()},
    **{f"{name}, infinity": _spoiled(case, np.inf) for name, case in NAN.items()},
    "no tokens": replace(
        MixtureCase(tokens=4, leading=(2, 2)).job((2,)), feeds={"values": np.zeros((0, 3, 96), np.float32)}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_experts_are_those_of_the_formula(name: str, answers: Mapping[str, Answer]) -> None:
    case = CASES[name]
    outputs = answers[name].outputs
    case.mixture(mlp).check(outputs[0])
    if case.wants_sum:
        np.testing.assert_array_equal(outputs[1], case.sum)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.shared is not None])
def test_formula_is_that_of_transformers(name: str) -> None:
    """With the dequantized weights and activations that are not rounded; of the op within what that costs."""
    import torch
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    case = CASES[name]
    assert case.shared is not None and case.shared_matrices is not None
    config = Qwen2MoeConfig(
        hidden_size=case.hidden,
        moe_intermediate_size=case.routed.inner,
        shared_expert_intermediate_size=case.shared.inner,
        num_experts=case.experts,
        num_experts_per_tok=case.k,
        norm_topk_prob=case.normalize,
    )
    block = Qwen2MoeSparseMoeBlock(config).double()
    experts = [[matrix.dequantized for matrix in matrices] for matrices in case.matrices]
    gate, up, down = (matrix.dequantized for matrix in case.shared_matrices)
    weights = {
        "gate.weight": case.tensors["router"].T,
        "experts.gate_up_proj": np.stack([np.concatenate(expert[:2]) for expert in experts]),
        "experts.down_proj": np.stack([expert[2] for expert in experts]),
        "shared_expert.gate_proj.weight": gate,
        "shared_expert.up_proj.weight": up,
        "shared_expert.down_proj.weight": down,
        "shared_expert_gate.weight": case.tensors["shared_weight"].T,
    }
    block.load_state_dict({key: torch.from_numpy(np.array(value, np.float64)) for key, value in weights.items()})
    rows = normalized(case.sum, case.tensors.get("norm_weight"), EPSILON).value
    with torch.no_grad():
        expected = block(torch.from_numpy(rows.reshape(1, -1, case.hidden))).numpy().reshape(rows.shape)
    found = case.mixture(exact_mlp).value
    # transformers has the softmax in fp32.
    assert np.linalg.norm(found - expected) < 10 * FLOAT32_EXACT * np.linalg.norm(expected)
    rounded = case.mixture(mlp).value
    assert 0 < np.linalg.norm(rounded - expected) < INT8_ACTIVATIONS * np.linalg.norm(expected)


def test_cases_meet_what_routing_branches_on() -> None:
    assert (CASES["5 tokens, equal logits"].routing[0] == [0, 1]).all()
    assert (CASES["64 tokens, all for one"].routing[0][:, 0] == 4).all()
    assert len(np.unique(CASES["3 tokens"].routing[0])) < 6, "some experts get no token"
    assert len(np.unique(CASES["64 tokens"].routing[0])) == 6, "all experts get some"


@pytest.mark.parametrize("value", ["", ", infinity"])
@pytest.mark.parametrize("name", NAN)
def test_what_is_no_number_stays_in_its_token(name: str, value: str, answers: Mapping[str, Answer]) -> None:
    found = answers[name + value].outputs[0]
    case = NAN[name]
    others = [token for token in range(case.tokens) if token != _SPOILED]
    assert not np.isfinite(found[_SPOILED]).any()
    case.mixture(mlp)[others].check(found[others])


def test_no_tokens_give_no_tokens(answers: Mapping[str, Answer]) -> None:
    assert answers["no tokens"].outputs[0].shape == (0, 3, 96)
