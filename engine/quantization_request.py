"""What ``export --quantize`` asks for: a recipe, the texts to calibrate and to judge by, and what may be lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwenforge.calibration import recipes
from qwenforge.calibration.budget import Budget, default_budget, parse_budget
from qwenforge.calibration.recipes import Recipe
from qwenforge.devices import Device
from qwenforge.engine.ort_cpu_graphs import Optimize
from qwenforge.recipe_names import require_recipe


@dataclass(frozen=True)
class QuantizationRequest:
    """How to quantize an export and what its result is held to.

    Attributes:
        recipe: with the overrides and the cache format asked for.
        budget: beyond it no bundle is written.
        calibration_data: text for ranges and searches; None for the built-in sample.
        calibration_rows: rows of it at most; None for the default.
        heldout_data: text to judge by; None for the built-in held-out sample.
        auto: search the sites to leave in higher precision so that the budget holds.
        optimize: what an ort-cpu bundle's graphs are for (:mod:`qwenforge.engine.ort_cpu_graphs`).
        work_folder: where calibration keeps its state; None for a hidden folder beside the output.
    """

    recipe: Recipe
    budget: Budget
    calibration_data: Path | None = None
    calibration_rows: int | None = None
    heldout_data: Path | None = None
    auto: bool = False
    optimize: Optimize = "latency"
    work_folder: Path | None = None


def quantization_request(
    recipe: str,
    *,
    overrides: Sequence[str] = (),
    cache: Literal["int8", "fp8"] | None = None,
    budget: str | None = None,
    calibration_data: Path | None = None,
    calibration_rows: int | None = None,
    heldout_data: Path | None = None,
    auto: bool = False,
    optimize: Optimize = "latency",
    work_folder: Path | None = None,
) -> QuantizationRequest:
    """The request that these command-line arguments make; ``recipe`` is a name or a ``.json`` file.

    Raises:
        UserError: the recipe, an override or the budget cannot be understood.
    """
    chosen = recipes.get(recipe).override(*overrides)
    if cache is not None:
        chosen = chosen.changed(cache=cache)
    allowed = default_budget(chosen.weight, activations=chosen.activation is not None, cache=chosen.cache is not None)
    if budget is not None:
        allowed = parse_budget(budget, allowed)
    return QuantizationRequest(
        recipe=chosen,
        budget=allowed,
        calibration_data=calibration_data,
        calibration_rows=calibration_rows,
        heldout_data=heldout_data,
        auto=auto,
        optimize=optimize,
        work_folder=work_folder,
    )


def require_device(recipe: Recipe, device: Device) -> None:
    """Refuse a recipe with a number format that ``device`` cannot use.

    Raises:
        UnsupportedError: the message names the alternatives.
    """
    formats = [recipe.weight, recipe.activation, recipe.cache]
    formats += [override.action for override in recipe.overrides if override.action in ("int8", "int4", "fp8")]
    require_recipe(device, recipe.name, [precision for precision in formats if precision is not None])
