"""QuantizedMixtureOfExperts in ONNX Runtime, with each instruction set, against transformers' block in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest

from support.cpu_reference import Approximate, Array, Stored, exact_mlp, mlp, normalized, on_grid
from support.cpu_runs import Answer, Job, node_model
from support.tolerances import FLOAT32_EXACT, INT8_ACTIVATIONS

EPSILON = 1e-6


@dataclass(frozen=True)
class Form:
    """How gate and up, then down, are stored."""

    inner: int
    bits: int = 4
    group: int = 32
    down_bits: int = 4
    down_group: int = 32


@dataclass(frozen=True)
class Case:
    """``shared`` is the shared expert, ``logits`` how the router's answers are: random, equal, or all for one."""

    tokens: int = 1
    experts: int = 6
    k: int = 2
    normalize: bool = True
    hidden: int = 96
    routed: Form = Form(64)
    shared: Form | None = None
    logits: str = "random"
    leading: tuple[int, ...] = ()
    half_scales: bool = True
    zero_points: bool = False
    residual: bool = False
    norm: bool = False
    wants_sum: bool = False

    def _expert(self, form: Form, seed: int) -> tuple[Stored, Stored, Stored]:
        stored = functools.partial(Stored.random, half_scales=self.half_scales, zero_points=self.zero_points)
        return (
            stored(form.inner, self.hidden, form.bits, form.group, seed=3 * seed),
            stored(form.inner, self.hidden, form.bits, form.group, seed=3 * seed + 1),
            stored(self.hidden, form.inner, form.down_bits, form.down_group, seed=3 * seed + 2),
        )

    @functools.cached_property
    def matrices(self) -> list[tuple[Stored, Stored, Stored]]:
        """Gate, up and down of each routed expert."""
        return [self._expert(self.routed, expert) for expert in range(self.experts)]

    @functools.cached_property
    def shared_matrices(self) -> tuple[Stored, Stored, Stored] | None:
        return None if self.shared is None else self._expert(self.shared, 1000)

    @functools.cached_property
    def tensors(self) -> dict[str, Array]:
        rng = np.random.default_rng([self.tokens, self.experts, self.k, self.hidden])
        shape = (*(self.leading or (self.tokens,)), self.hidden)
        tensors = {"values": on_grid(rng, self.tokens, self.hidden, self.routed.group).reshape(shape)}
        router = rng.standard_normal((self.hidden, self.experts), np.float32) / np.float32(self.hidden**0.5)
        if self.logits == "equal":
            router[:, 1:] = router[:, :1]
        if self.logits == "all for one":
            router[0, 4] = 100
            tensors["values"][..., 0] = np.float32(127 * 2.0**-4)
        tensors["router"] = router
        if self.residual:
            tensors["residual"] = (rng.integers(-64, 65, shape) * np.float32(2.0**-6)).astype(np.float32)
            tensors["values"] = tensors["values"] - tensors["residual"]
        if self.norm:
            tensors["norm_weight"] = rng.uniform(0.5, 1.5, self.hidden).astype(np.float32)
        if self.shared is not None:
            tensors["shared_weight"] = (rng.standard_normal((self.hidden, 1)) / self.hidden**0.5).astype(np.float32)
        return tensors

    @property
    def sum(self) -> Array:
        values = self.tensors["values"]
        return np.asarray(values + self.tensors["residual"] if self.residual else values)

    @functools.cached_property
    def routing(self) -> tuple[Array, Array]:
        """Experts and weights [tokens, k], of equal logits the first."""
        rows = normalized(self.sum, self.tensors.get("norm_weight"), EPSILON).value.reshape(-1, self.hidden)
        logits = rows @ self.tensors["router"].astype(np.float64)
        chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : self.k]
        parts = np.exp(logits - logits.max(-1, keepdims=True))
        weights = np.take_along_axis(parts / parts.sum(-1, keepdims=True), chosen, -1)
        return chosen, weights / weights.sum(-1, keepdims=True) if self.normalize else weights

    def mixture(self, expert: Callable[[Approximate, Stored, Stored, Stored], Approximate]) -> Approximate:
        """Qwen2MoeSparseMoeBlock's answer, where ``expert`` is what an expert computes."""
        rows = normalized(self.sum, self.tensors.get("norm_weight"), EPSILON)
        flat = Approximate(*(each.reshape(-1, self.hidden) for each in (rows.value, rows.slack)))
        value, slack = np.zeros_like(flat.value), np.zeros_like(flat.value)
        reach = np.abs(flat.value) @ np.abs(self.tensors["router"].astype(np.float64)).max(-1)
        for index, matrices in enumerate(self.matrices):
            of_token, slot = np.nonzero(self.routing[0] == index)
            if not len(of_token):
                continue
            part, by = expert(flat[of_token], *matrices), self.routing[1][of_token, slot][:, None]
            value[of_token] += by * part.value
            # A weight is as uncertain as the exponent of its logit.
            uncertain = FLOAT32_EXACT * (1 + reach[of_token])[:, None]
            slack[of_token] += by * (part.slack + uncertain * np.abs(part.value))
        if self.shared_matrices is not None:
            part = expert(flat, *self.shared_matrices)
            weight = self.tensors["shared_weight"].astype(np.float64)
            by = 1 / (1 + np.exp(-flat.value @ weight))
            uncertain = FLOAT32_EXACT * (1 + np.abs(flat.value) @ np.abs(weight))
            value, slack = value + by * part.value, slack + by * (part.slack + uncertain * np.abs(part.value))
        shape = self.sum.shape
        return Approximate(value.reshape(shape), slack.reshape(shape))

    def job(self, threads: tuple[int, ...] = (1, 2, 4)) -> Job:
        given = self.tensors
        fed = {name: given[name] for name in ("values", "residual") if name in given}
        inputs: list[tuple[str, Array | None]] = [("values", None), ("router", given["router"])]
        # Rows of gate and up take turns.
        both = [
            [None if one is None else np.stack([one, other], 1).reshape(2 * one.shape[0], -1) for one, other in pairs]
            for pairs in (zip(gate.tensors, up.tensors, strict=True) for gate, up, _ in self.matrices)
        ]
        for name, parts in (("gate_up", both), ("down", [down.tensors for _, _, down in self.matrices])):
            stacked = [None if parts[0][i] is None else np.stack([part[i] for part in parts]) for i in range(3)]
            inputs += zip(_places(name), stacked, strict=True)
        attributes: dict[str, float] = {
            "hidden_size": self.hidden,
            "intermediate_size": self.routed.inner,
            "num_experts": self.experts,
            "k": self.k,
            "normalize_routing_weights": int(self.normalize),
            "bits": self.routed.bits,
            "block_size": self.routed.group,
            "down_bits": self.routed.down_bits,
            "down_block_size": self.routed.down_group,
            "epsilon": EPSILON,
        }
        for name, matrix in zip(
            ("shared_gate", "shared_up", "shared_down"), self.shared_matrices or [None] * 3, strict=True
        ):
            inputs += zip(_places(name), matrix.tensors if matrix is not None else [None] * 3, strict=True)
        if self.shared is not None:
            attributes |= {
                "shared_intermediate_size": self.shared.inner,
                "shared_bits": self.shared.bits,
                "shared_block_size": self.shared.group,
                "shared_down_bits": self.shared.down_bits,
                "shared_down_block_size": self.shared.down_group,
            }
        inputs += [(name, given.get(name)) for name in ("shared_weight", "residual", "norm_weight")]
        model = node_model("QuantizedMixtureOfExperts", inputs, attributes, fed=fed, wants_sum=self.wants_sum)
        return Job(model, fed, threads)


def _places(name: str) -> tuple[str, str, str]:
    return name, f"{name}_scales", f"{name}_zero_points"


OTHER = Form(80, 8, 16, 4, 64)
CASES = {
    "one token": Case(),
    "one token, k = 1": Case(k=1, normalize=False),
    "one token, k = 4, not normalized": Case(k=4, normalize=False),
    "one token, all experts": Case(experts=3, k=3),
    "one token, many experts": Case(experts=21, k=4),
    "one token, shared": Case(shared=Form(72)),
    "one token, shared of another form": Case(shared=OTHER, k=3, normalize=False),
    "one token, equal logits": Case(logits="equal", k=3),
    "one token, norm": Case(norm=True, shared=Form(64)),
    "one token, sum": Case(residual=True, norm=True, wants_sum=True, shared=Form(40, 4, 32, 8, 16)),
    "3 tokens": Case(tokens=3),
    "3 tokens, all for one": Case(tokens=3, k=1, logits="all for one"),
    "3 tokens, shared": Case(tokens=3, leading=(1, 3), shared=OTHER, k=2, experts=4, zero_points=True),
    "4 tokens, int8": Case(tokens=4, leading=(2, 2), routed=Form(48, 8, 16, 8, 128), residual=True, half_scales=False),
    "5 tokens": Case(tokens=5, k=3, normalize=False),
    "5 tokens, shared": Case(tokens=5, shared=Form(200, 4, 128, 4, 16), residual=True, wants_sum=True),
    "5 tokens, equal logits": Case(tokens=5, logits="equal", k=2, normalize=False),
    "5 tokens, all for one": Case(tokens=5, k=1, logits="all for one", shared=Form(32)),
    "5 tokens, int8 and int4": Case(tokens=5, routed=Form(33, 8, 64, 4, 16), hidden=100, zero_points=True),
    "64 tokens": Case(tokens=64, leading=(2, 32)),
    "64 tokens, k = 4": Case(tokens=64, experts=8, k=4, normalize=False, shared=OTHER, hidden=128),
    "64 tokens, all for one": Case(tokens=64, k=2, logits="all for one", shared=Form(64, 8, 32, 8, 32)),
    "64 tokens, norm": Case(tokens=64, leading=(4, 16), norm=True, residual=True, wants_sum=True, shared=Form(64)),
    "64 tokens of odd widths": Case(tokens=64, hidden=77, routed=Form(45, 4, 16, 8, 16), zero_points=True),
    "wide, one token": Case(hidden=1100, routed=Form(1100), shared=Form(600), experts=3),
    "wide, 6 tokens": Case(tokens=6, hidden=1100, routed=Form(300), shared=Form(600), experts=3),
}
NAN = {"nan in few tokens": Case(tokens=3, shared=Form(64)), "nan in many tokens": Case(tokens=7, shared=Form(64))}
_SPOILED = 1


def _spoiled(case: Case, value: float) -> Job:
    job = case.job((2,))
    values = job.feeds["values"].copy()
    values[_SPOILED, 40] = value
    return replace(job, feeds={"values": values})


JOBS = {
    **{name: case.job() for name, case in CASES.items()},
    **{name: _spoiled(case, np.nan) for name, case in NAN.items()},
    **{f"{name}, infinity": _spoiled(case, np.inf) for name, case in NAN.items()},
    "no tokens": replace(Case(tokens=4, leading=(2, 2)).job((2,)), feeds={"values": np.zeros((0, 3, 96), np.float32)}),
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
