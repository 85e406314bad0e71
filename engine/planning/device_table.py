"""The tables of ``docs/recipes-by-device.md``, computed by ``qwenforge plan``'s code.

``python -m qwenforge.engine.planning.device_table`` prints them; a test holds the page to them.
"""

from __future__ import annotations

from qwenforge.devices import GB, get_device
from qwenforge.engine.planning.known_models import model_config
from qwenforge.engine.planning.model_size import cache_bytes_per_token, count_parameters
from qwenforge.engine.planning.plan import RecipePlan, Workload, decode_bytes, make_plan
from qwenforge.engine.planning.recipes import RECIPES
from qwenforge.recipe_names import offered

MODELS = ("qwen2-0.5b", "qwen2-7b", "qwen2-57b-a14b")
DEVICES = ("jetson-orin-nano", "jetson-orin-agx", "jetson-thor", "l4", "rtx-4090", "a100", "h100")
WORKLOAD = Workload(max_length=4096)
"""One row of 4096 tokens, keys and values in 16 bits."""

_SIXTEEN_BITS = 2.0


def tables() -> str:
    """All tables as Markdown, each under its heading."""
    parts = ["### What a device is offered", "", *_offers(), ""]
    for model in MODELS:
        config = model_config(model)[1]
        count = count_parameters(config).total
        parts += [
            f"### {model}",
            "",
            f"{count / 1e9:.2f} billion parameters.",
            "",
            *_sizes(model),
            "",
            *_speeds(model),
            "",
        ]
    return "\n".join(parts).rstrip() + "\n"


def _offers() -> list[str]:
    rows = []
    for name in DEVICES:
        device = get_device(name)
        bandwidth, memory = f"{device.bandwidth / GB:.0f}", f"{device.memory_bytes / GB:.0f}"
        rows.append(
            [f"`{name}`", str(device.sm), memory, bandwidth, ", ".join(f"`{each}`" for each in offered(device))]
        )
    return _markdown(["device", "SM", "memory GB", "bandwidth GB/s", "recipes"], rows)


def _sizes(model: str) -> list[str]:
    config = model_config(model)[1]
    parameters = count_parameters(config)
    cache = cache_bytes_per_token(config, _SIXTEEN_BITS) * WORKLOAD.max_length
    rows = []
    for recipe in RECIPES:
        read = decode_bytes(config, parameters, WORKLOAD, recipe)
        rows.append(
            [f"`{recipe.name}`", *(_gigabytes(size) for size in (recipe.weight_bytes(parameters), cache, read))]
        )
    return _markdown(["recipe", "weights GB", "KV GB", "read for a token GB"], rows)


def _speeds(model: str) -> list[str]:
    config = model_config(model)[1]
    rows = []
    for name in DEVICES:
        plan = make_plan(config, get_device(name), WORKLOAD)
        found = {each.recipe.name: each for each in plan.recipes}
        cells = [_speed(found.get(recipe.name)) for recipe in RECIPES]
        rows.append([f"`{name}`", *cells])
    return _markdown(["tokens/s at most", *(f"`{recipe.name}`" for recipe in RECIPES)], rows)


def _speed(plan: RecipePlan | None) -> str:
    """The bound on one device; why there is none otherwise."""
    if plan is None:
        return "not offered"
    if plan.devices != 1:
        return f"{plan.devices} devices" if plan.devices else "does not fit"
    return f"{1 / plan.itl.seconds:.0f}"


def _gigabytes(size: float) -> str:
    return f"{size / GB:.2f}"


def _markdown(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    print(tables(), end="")
