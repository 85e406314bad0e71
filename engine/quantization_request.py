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
from qwenforge.errors import UnsupportedError
from qwenforge.lowering_choice import LoweringChoice
from qwenforge.ort_cuda_choice import ORT_CUDA
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
        UnsupportedError: the message names the recipes that it can use.
    """
    require_recipe(device, recipe.name, _formats(recipe))


def require_target(recipe: Recipe, target: str, choice: LoweringChoice | None) -> None:
    """Refuse a recipe that ``target`` has no kernels for: the lowering would refuse it too, after the calibration.

    Raises:
        UnsupportedError: the message says what to choose instead.
    """
    products = _formats(recipe.changed(cache=None))
    if target == "ort-cpu" and (recipe.cache is not None or "fp8" in products):
        what = "FP8 products" if "fp8" in products else "8-bit caches"
        raise UnsupportedError(
            f"ONNX Runtime has no {what} on a CPU; use int8-w8a8, int8-weight-only or int4-weight-only without --cache "
            "for ort-cpu, or another --target."
        )
    if target == ORT_CUDA and (recipe.activation is not None or "fp8" in products):
        raise UnsupportedError(
            f"ONNX Runtime on CUDA has no kernels for recipe {recipe.name}, only for quantized weights; use "
            "int8-weight-only or int4-weight-only, or --target tensorrt."
        )
    if recipe.cache is not None and choice is not None and choice.attention == "native":
        raise UnsupportedError(
            f"--cache {recipe.cache} needs our own attention, which has 8-bit caches; add --attention plugin."
        )


def _formats(recipe: Recipe) -> list[str]:
    formats = [recipe.weight, recipe.activation, recipe.cache]
    formats += [override.action for override in recipe.overrides if override.action in ("int8", "int4", "fp8")]
    return [precision for precision in formats if precision is not None]
