"""``plan --html``: the plan as one page that needs nothing else, with memory drawn as stacked bars."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qwenforge.engine.planning.plan import Plan

_WIDTH = 640
_COLORS = (("weights", "#4269d0"), ("KV cache", "#efb118"), ("workspace", "#6cc5b0"))


@dataclass(frozen=True)
class Bar:
    """One recipe's bar: (color, x, width) in pixels for each part, and the label behind it."""

    name: str
    parts: tuple[tuple[str, float, float], ...]
    label: str


def render_page(name: str, plan: Plan) -> str:
    """The page for ``plan`` of the model ``name``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    scale = _WIDTH / max(plan.usable_bytes, *(recipe.device_bytes for recipe in plan.recipes))
    return environment.get_template("plan.html.jinja").render(
        name=name, plan=plan, bars=_bars(plan, scale), colors=_COLORS, width=_WIDTH, limit=plan.usable_bytes * scale
    )


def _bars(plan: Plan, scale: float) -> list[Bar]:
    bars = []
    for recipe in plan.recipes:
        split = max(recipe.devices, 1)
        sizes = (recipe.weight_bytes / split, recipe.cache_bytes / split, recipe.workspace_bytes)
        parts, x = [], 0.0
        for (_, color), size in zip(_COLORS, sizes, strict=True):
            parts.append((color, x, size * scale))
            x += size * scale
        devices = (
            f"{recipe.devices} devices" if recipe.devices > 1 else "1 device" if recipe.devices else "does not fit"
        )
        bars.append(Bar(recipe.recipe.name, tuple(parts), f"{recipe.device_bytes / 1e9:.1f} GB, {devices}"))
    return bars
