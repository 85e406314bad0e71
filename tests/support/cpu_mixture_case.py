"""One QuantizedMixtureOfExperts: its model, its inputs and its answer in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from support.cpu_reference import Approximate, Array, Stored, normalized, on_grid
from support.cpu_runs import Job, node_model
from support.tolerances import FLOAT32_EXACT

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
class MixtureCase:
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
        of_weights = np.random.default_rng([self.experts, self.k, self.hidden])
        shape = (*(self.leading or (self.tokens,)), self.hidden)
        tensors = {"values": on_grid(rng, self.tokens, self.hidden, self.routed.group).reshape(shape)}
        router = of_weights.standard_normal((self.hidden, self.experts), np.float32) / np.float32(self.hidden**0.5)
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
            tensors["norm_weight"] = of_weights.uniform(0.5, 1.5, self.hidden).astype(np.float32)
        if self.shared is not None:
            tensors["shared_weight"] = (of_weights.standard_normal((self.hidden, 1)) / self.hidden**0.5).astype(
                np.float32
            )
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
