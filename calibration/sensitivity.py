"""Which parts of a model to leave in higher precision: the search behind ``--auto``.

A *group* is a layer's attention, a layer's feed-forward part with its experts, or the vocabulary projection: the sites
that share smoothing factors, so that a group's level is a choice of its own. A *level* is what is done to a group:
``recipe``, then a milder format, then ``keep``.

Each group is first measured alone at each level, everything else unquantized; the mean KL that remains is its
sensitivity. One step up a level of one group gains the difference and costs bytes. Steps are put in order of gain a
byte, and the shortest beginning of that sequence is found, by bisection, with which the budget holds for the whole
model; then steps that turn out not to be needed are taken back, the least useful ones first. Every figure comes from
running the model; the sequence is the only guess. Nothing is random.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwenforge.calibration.accuracy import DistributionAccuracy
from qwenforge.calibration.budget import Budget
from qwenforge.calibration.recipes import Recipe
from qwenforge.errors import VerificationError
from qwenforge.graph_passes.quantize.plan import QuantizationPlan

Level = Literal["recipe", "int8", "fp8", "keep"]
Choice = Mapping[str, Level]
"""The level of each group."""
Tell = Callable[[str, float], None]

MARGIN = 0.9
"""Part of the budget that a choice may use on the text it was chosen by: it will be judged by another."""
MOST_TAKEN_BACK = 12
"""How many steps are tried to be taken back at most; each try runs the model."""

_GROUP = re.compile(r"^(model\.layers\.\d+\.(?:self_attn|mlp|input_layernorm|post_attention_layernorm)|lm_head)\b")
_NORMS = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}


def group_of(name: str) -> str:
    """The group of a site or of smoothing factors: ``model.layers.3.mlp`` of ``model.layers.3.mlp.down_proj``."""
    found = _GROUP.match(name)
    if found is None:
        raise ValueError(f"{name} belongs to no group of sites")
    prefix, _, part = found[1].rpartition(".")
    return f"{prefix}.{_NORMS[part]}" if part in _NORMS else found[1]


def levels_of(recipe: Recipe) -> tuple[Level, ...]:
    """What may be done to a group, from the recipe to nothing; each level is milder than the one before it."""
    if recipe.weight == "int4":
        return ("recipe", "int8", "keep")
    if recipe.activation is not None:
        return ("recipe", recipe.activation, "keep")  # the weights alone
    return ("recipe", "keep")


def milder_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the level between ``recipe`` and ``keep``, where there is one; it needs no text.

    The cache is left to the plan of ``recipe``.
    """
    if recipe.weight == "int4":
        return recipe.changed(
            weight="int8",
            weight_granularity="channel",
            group_size=None,
            smoothing=None,
            clipping=False,
            rounding="nearest",
            cache=None,
        )
    return recipe.changed(activation=None, smoothing=None, cache=None)


def mixed_plan(plans: Mapping[Level, QuantizationPlan], choice: Choice) -> QuantizationPlan:
    """The plan that takes each group's sites, smoothing and numbers from the plan of its level; ``keep`` has none.

    Caches, which are no group's, are those of the plan of level ``recipe``.
    """
    base = plans["recipe"]

    def chosen(name: str, level: Level) -> bool:
        return choice.get(group_of(name), "recipe") == level

    kept = {name: plan for level, each in plans.items() for name, plan in each.sites.items() if chosen(name, level)}
    return QuantizationPlan(
        recipe=base.recipe,
        sites={name: kept[name] for name in base.sites if name in kept},
        caches=base.caches,
        smoothed=tuple(name for level, each in plans.items() for name in each.smoothed if chosen(name, level)),
        tensors={
            name: tensor
            for level, each in plans.items()
            for name, tensor in each.tensors.items()
            if (level == "recipe" if _is_of_a_cache(name) else chosen(name, level))
        },
    )


def _is_of_a_cache(name: str) -> bool:
    return name.endswith((".key_scales", ".value_scales"))


def overrides_of(choice: Choice) -> tuple[str, ...]:
    """The choice as ``--override`` takes it: every site of a group, for the groups that are not at ``recipe``."""
    return tuple(
        f"{group if group == 'lm_head' else group + '.*'}={level}"
        for group, level in choice.items()
        if level != "recipe"
    )


@dataclass(frozen=True)
class Sensitivity:
    """What one group costs alone: the mean KL, in nats, of the model in which it alone is quantized, at ``level``."""

    group: str
    level: Level
    mean_kl: float


@dataclass(frozen=True)
class FrontierPoint:
    """One choice that was measured.

    Attributes:
        raised: the groups that are not at the recipe's level, and their levels.
        bytes: of the quantizable weights.
        accuracy: on the text that choices are made by.
        holds: whether it is within the budget, margin included.
    """

    raised: Mapping[str, Level]
    bytes: int
    accuracy: DistributionAccuracy
    holds: bool


@dataclass(frozen=True)
class Frontier:
    """What the search saw.

    Attributes:
        sensitivities: of each group at each level, as measured.
        points: every measured choice, smallest first.
        chosen: the index of the one that is used.
    """

    sensitivities: tuple[Sensitivity, ...]
    points: tuple[FrontierPoint, ...]
    chosen: int

    @property
    def choice(self) -> Mapping[str, Level]:
        """The groups to raise above the recipe's level, and to what."""
        return self.points[self.chosen].raised

    def to_json(self) -> dict[str, Any]:
        """The frontier as JSON."""
        return {
            "sensitivities": [
                {"group": each.group, "level": each.level, "mean_kl": each.mean_kl} for each in self.sensitivities
            ],
            "points": [
                {
                    "raised": dict(point.raised),
                    "bytes": point.bytes,
                    "mean_kl": point.accuracy.mean_kl,
                    "perplexity_ratio": point.accuracy.perplexity_ratio,
                    "top1_agreement": point.accuracy.top1_agreement,
                    "holds": point.holds,
                }
                for point in self.points
            ],
            "chosen": self.chosen,
        }


@dataclass(frozen=True)
class _Step:
    group: str
    to: Level
    gain_per_byte: float


def search(
    groups: Sequence[str],
    levels: Sequence[Level],
    *,
    alone: Callable[[str, Level], float],
    size: Callable[[Choice], int],
    measure: Callable[[Choice], DistributionAccuracy],
    budget: Budget,
    tell: Tell | None = None,
) -> Frontier:
    """The smallest choice, in bytes, that the search finds to hold ``budget``.

    Args:
        groups: in execution order.
        levels: as :func:`levels_of`.
        alone: the mean KL of the model with one group at one level and the others unquantized.
        size: bytes of a choice.
        measure: the accuracy of a choice.
        budget: what is allowed.
        tell: told what is being done.

    Raises:
        VerificationError: the budget does not hold even with every group at ``keep``.
    """
    say = tell or (lambda _, __: None)
    wanted = budget.tightened(MARGIN)
    quantizing = [level for level in levels if level != "keep"]
    sensitivities: list[Sensitivity] = []
    for index, group in enumerate(groups):
        for level in quantizing:
            say(f"auto: {group} alone as {level}", index / len(groups))
            sensitivities.append(Sensitivity(group, level, alone(group, level)))
    steps = _steps(groups, levels, sensitivities, size)
    measured: dict[tuple[tuple[str, Level], ...], FrontierPoint] = {}

    def point(taken: Sequence[_Step]) -> FrontierPoint:
        raised: dict[str, Level] = {}
        for step in taken:  # later steps of a group go further
            raised[step.group] = step.to
        ordered = {group: raised[group] for group in groups if group in raised}
        key = tuple(ordered.items())
        if key not in measured:
            say(f"auto: {len(ordered)} of {len(groups)} groups raised", len(measured) / (len(measured) + 4))
            accuracy = measure(ordered)
            measured[key] = FrontierPoint(ordered, size(ordered), accuracy, not wanted.missed(accuracy))
        return measured[key]

    low, high = 0, len(steps)
    if not point(steps[:low]).holds:
        if not point(steps).holds:
            raise VerificationError(
                "--auto cannot hold the budget even with every site in high precision: "
                f"{'; '.join(wanted.missed(point(steps).accuracy))}; allow more with --budget, or leave the key/value "
                "cache as it is."
            )
        while high - low > 1:  # steps[:low] misses, steps[:high] holds
            middle = (low + high) // 2
            low, high = (low, middle) if point(steps[:middle]).holds else (middle, high)
        taken = _without_needless(steps[:high], lambda fewer: point(fewer).holds)
    else:
        taken = []
    best = point(taken)
    points = sorted(measured.values(), key=lambda each: (each.bytes, len(each.raised), sorted(each.raised)))
    return Frontier(tuple(sensitivities), tuple(points), points.index(best))


def _steps(
    groups: Sequence[str], levels: Sequence[Level], sensitivities: Sequence[Sensitivity], size: Callable[[Choice], int]
) -> list[_Step]:
    """Every step of every group, the most gain a byte first; a group's steps in the order of its levels."""
    known = {(each.group, each.level): each.mean_kl for each in sensitivities}
    nothing = size({})
    found: list[_Step] = []
    for group in groups:
        best = float("inf")
        before = nothing
        for level, milder in itertools.pairwise(levels):
            gain = known[group, level] - known.get((group, milder), 0.0)
            after = size({group: milder})
            # A later step must not come before an earlier one of its group.
            best = min(best, max(gain, 0.0) / max(after - before, 1))
            before = after
            found.append(_Step(group, milder, best))
    return sorted(found, key=lambda step: -step.gain_per_byte)  # stable: equal steps stay in execution order


def _without_needless(taken: list[_Step], holds: Callable[[list[_Step]], bool]) -> list[_Step]:
    """``taken`` without the steps, tried from the last, that the budget does not need."""
    tries = MOST_TAKEN_BACK
    for step in reversed(taken[:-1]):  # without the last one it does not hold: that was measured
        later = any(other.group == step.group and other is not step for other in taken[taken.index(step) :])
        if tries == 0:
            break
        if later:
            continue
        tries -= 1
        fewer = [other for other in taken if other is not step]
        if holds(fewer):
            taken = fewer
    return taken
