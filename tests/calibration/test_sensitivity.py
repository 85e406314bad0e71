"""The search for what to leave in higher precision, on models whose errors are known numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.calibration import recipes
from qwenforge.calibration.accuracy import DistributionAccuracy
from qwenforge.calibration.budget import Budget
from qwenforge.calibration.sensitivity import (
    MARGIN,
    Level,
    group_of,
    levels_of,
    milder_recipe,
    mixed_plan,
    overrides_of,
    search,
)
from qwenforge.errors import VerificationError
from qwenforge.graph_passes.quantize.plan import CachePlan, QuantizationPlan, SitePlan

LEVELS: tuple[Level, ...] = ("recipe", "int8", "keep")
_BITS = {"recipe": 4, "int8": 8, "keep": 32}


class Additive:
    """A model whose divergence is the sum of its groups', 30 times less at int8, and whose groups are equally large."""

    def __init__(self, errors: Mapping[str, float], *, floor: float = 0.0) -> None:
        self.errors = errors
        self.floor = floor
        self.measured: list[dict[str, Level]] = []

    def alone(self, group: str, level: Level) -> float:
        return self.errors[group] * {"recipe": 1.0, "int8": 1 / 30, "keep": 0.0}[level]

    def size(self, choice: Mapping[str, Level]) -> int:
        return sum(100 * _BITS[choice.get(group, "recipe")] for group in self.errors)

    def divergence(self, choice: Mapping[str, Level]) -> float:
        return self.floor + sum(self.alone(group, choice.get(group, "recipe")) for group in self.errors)

    def measure(self, choice: Mapping[str, Level]) -> DistributionAccuracy:
        self.measured.append(dict(choice))
        found = self.divergence(choice)
        return DistributionAccuracy(100, 10.0, 10.0 * (1 + found), found, found, found, 1 - found, ())

    def smallest(self, limit: float) -> int:
        """Bytes of the smallest choice within ``limit``, by trying all."""
        choices = (
            dict(zip(self.errors, levels, strict=True)) for levels in itertools.product(LEVELS, repeat=len(self.errors))
        )
        return min(self.size(choice) for choice in choices if self.divergence(choice) <= limit)


def run(model: Additive, kl: float) -> tuple[Mapping[str, Level], int]:
    frontier = search(
        list(model.errors),
        LEVELS,
        alone=model.alone,
        size=model.size,
        measure=model.measure,
        budget=Budget(kl=kl, ppl=10.0, top1=0.0),
    )
    point = frontier.points[frontier.chosen]
    assert point.holds and point.accuracy.mean_kl <= kl * MARGIN
    assert [each.bytes for each in frontier.points] == sorted(each.bytes for each in frontier.points)
    return frontier.choice, point.bytes


def test_nothing_is_raised_when_the_budget_holds() -> None:
    model = Additive({"a": 0.01, "b": 0.02})
    assert run(model, 0.1) == ({}, 800)
    assert model.measured == [{}]


def test_one_sensitive_group_alone_is_raised() -> None:
    model = Additive({**{f"g{index}": 0.001 for index in range(12)}, "bad": 0.5, "last": 0.001})
    assert run(model, 0.05)[0] == {"bad": "int8"}


def test_a_group_goes_further_where_int8_is_not_enough() -> None:
    model = Additive({"a": 0.001, "bad": 30.0, "b": 0.001})
    assert run(model, 0.05)[0] == {"bad": "keep"}


@pytest.mark.parametrize("seed", range(8))
def test_choice_is_close_to_the_best_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    model = Additive({f"g{index}": float(10 ** generator.uniform(-4, -1)) for index in range(7)})
    limit = model.divergence({}) * float(generator.uniform(0.01, 0.7))
    _, size = run(model, limit)
    assert size <= model.smallest(limit * MARGIN) * 1.1


def test_same_measurements_give_the_same_choice() -> None:
    errors = {f"g{index}": 0.01 for index in range(6)}
    first, second = (run(Additive(errors), 0.03)[0] for _ in range(2))
    assert first == second and len(first) == 4


def test_a_budget_that_nothing_holds_is_refused() -> None:
    with pytest.raises(VerificationError, match=r"even with every site in high precision: mean KL is 0\.2"):
        run(Additive({"a": 0.1}, floor=0.2), 0.1)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn"),
        ("model.layers.3.self_attn.o_proj.weight_scales", "model.layers.3.self_attn"),
        ("model.layers.3.input_layernorm", "model.layers.3.self_attn"),
        ("model.layers.3.input_layernorm.smoothing", "model.layers.3.self_attn"),
        ("model.layers.3.post_attention_layernorm.smoothing", "model.layers.3.mlp"),
        ("model.layers.31.mlp.shared_expert.down_proj", "model.layers.31.mlp"),
        ("model.layers.3.mlp.experts.smoothing", "model.layers.3.mlp"),
        ("lm_head", "lm_head"),
        ("lm_head.weight_scales", "lm_head"),
    ],
)
def test_sites_and_their_numbers_belong_to_groups_that_share_smoothing(name: str, group: str) -> None:
    assert group_of(name) == group


def test_unknown_names_belong_to_no_group() -> None:
    with pytest.raises(ValueError, match="no group"):
        group_of("model.embed_tokens")


def _plan(recipe: str, weight: str, value: float) -> QuantizationPlan:
    sites = {
        name: SitePlan(weight=weight)  # type: ignore[arg-type]
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head")
    }
    tensors = {f"{name}.weight_scales": ir.tensor(np.float32([value])) for name in sites}
    tensors["model.layers.0.input_layernorm.smoothing"] = ir.tensor(np.float32([value]))
    tensors["model.layers.0.self_attn.cache.key_scales"] = ir.tensor(np.float32([value]))
    return QuantizationPlan(
        recipe,
        sites,
        {"model.layers.0.self_attn.cache": CachePlan(format="int8")},
        ("model.layers.0.input_layernorm",),
        tensors,
    )


def test_plans_are_mixed_group_by_group_with_their_own_smoothing_and_numbers() -> None:
    plans: dict[Level, QuantizationPlan] = {"recipe": _plan("four", "int4", 4), "int8": _plan("eight", "int8", 8)}
    mixed = mixed_plan(plans, {"model.layers.0.self_attn": "int8", "lm_head": "keep"})
    assert mixed.recipe == "four"
    assert {name: site.weight for name, site in mixed.sites.items()} == {
        "model.layers.0.self_attn.q_proj": "int8",
        "model.layers.0.mlp.down_proj": "int4",
    }
    assert {name: float(tensor.numpy()[0]) for name, tensor in mixed.tensors.items()} == {
        "model.layers.0.self_attn.q_proj.weight_scales": 8,
        "model.layers.0.input_layernorm.smoothing": 8,
        "model.layers.0.mlp.down_proj.weight_scales": 4,
        "model.layers.0.self_attn.cache.key_scales": 4,
    }
    assert mixed.smoothed == ("model.layers.0.input_layernorm",)
    assert list(mixed.caches) == ["model.layers.0.self_attn.cache"]


def test_choice_is_written_as_overrides_that_the_recipe_understands() -> None:
    overrides = overrides_of({"model.layers.0.mlp": "int8", "lm_head": "keep", "model.layers.1.mlp": "recipe"})
    assert overrides == ("model.layers.0.mlp.*=int8", "lm_head=keep")
    recipe = recipes.get("int4-weight-only").override(*overrides)
    assert recipe.choose("model.layers.0.mlp.down_proj", "mlp_output").weight == "int8"
    assert recipe.choose("model.layers.1.mlp.down_proj", "mlp_output").weight == "int4"


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("int4-weight-only", ("recipe", "int8", "keep")),
        ("int8-w8a8", ("recipe", "int8", "keep")),
        ("fp8", ("recipe", "fp8", "keep")),
        ("int8-weight-only", ("recipe", "keep")),
    ],
)
def test_levels_get_milder_and_need_no_text_of_their_own(name: str, levels: tuple[Level, ...]) -> None:
    recipe = recipes.get(name).changed(cache="int8").override("model.layers.0.*=keep")
    assert levels_of(recipe) == levels
    milder = milder_recipe(recipe)
    assert not milder.needs_data
    assert milder.overrides == recipe.overrides
