"""Which recipes a device is offered, what a refusal says, and that the page about it is what the code computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwenforge.calibration import recipes as calibrated
from qwenforge.devices import DEVICES, get_device
from qwenforge.engine.planning import device_table
from qwenforge.engine.planning.known_models import model_config
from qwenforge.engine.planning.model_size import count_parameters
from qwenforge.engine.planning.plan import make_plan
from qwenforge.engine.planning.recipes import RECIPES
from qwenforge.errors import UnsupportedError
from qwenforge.recipe_names import RECIPE_PRECISIONS, offered, require_recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipes-by-device.md"
INTEGERS = ("int8-w8a8", "int8-weight-only", "int4-weight-only")


def test_orin_and_a100_are_offered_integers_and_newer_devices_fp8_too() -> None:
    for name in ("jetson-orin-nano", "jetson-orin-nx", "jetson-orin-agx", "a100"):
        assert offered(DEVICES[name]) == INTEGERS
    for name in ("jetson-thor", "l4", "l40s", "rtx-4090", "h100", "h200", "b200"):
        assert offered(DEVICES[name]) == ("fp8", *INTEGERS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPE_PRECISIONS)
def test_a_recipe_is_refused_exactly_where_it_is_not_offered(recipe: str, device: str) -> None:
    if recipe in offered(DEVICES[device]):
        require_recipe(DEVICES[device], recipe)
        return
    with pytest.raises(UnsupportedError, match=f"recipe {recipe} needs FP8, and {device} ") as refused:
        require_recipe(DEVICES[device], recipe)
    assert "choose one of int8-w8a8, int8-weight-only, int4-weight-only." in str(refused.value)


def test_formats_of_a_recipe_of_ones_own_are_held_to_the_device_too() -> None:
    require_recipe(get_device("h100"), "mine", ["int8", "fp8"])
    with pytest.raises(UnsupportedError, match=r"recipe mine needs FP8, and a100 \(SM 80\) has no FP8 arithmetic"):
        require_recipe(get_device("a100"), "mine", ["int8", "fp8"])
    with pytest.raises(UnsupportedError, match="recipe int8-w8a8 needs FP8"):  # its cache
        require_recipe(get_device("jetson-orin-agx"), "int8-w8a8", ["fp8"])


def test_recipes_have_the_same_names_everywhere() -> None:
    planned = {recipe.name: recipe.weight for recipe in RECIPES if recipe.name != "bf16"}
    assert planned == dict(RECIPE_PRECISIONS)
    assert set(calibrated.NAMES) == set(RECIPE_PRECISIONS)
    assert {name: calibrated.get(name).weight for name in calibrated.NAMES} == dict(RECIPE_PRECISIONS)


def test_the_page_shows_what_the_code_computes() -> None:
    found = re.search(r"<!-- tables: begin -->\n(.*)<!-- tables: end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert found[1] == device_table.tables(), "print them with: python -m qwenforge.engine.planning.device_table"


def test_the_worked_example_of_the_page_is_the_arithmetic_it_describes() -> None:
    """Qwen2-7B in INT8 on an L4, from config.json's numbers and nothing of the planner's."""
    hidden, inner, layers, vocabulary, kv, heads = 3584, 18944, 28, 152064, 4 * 128, 28 * 128
    matrices = layers * (hidden * (heads + 2 * kv) + heads * hidden + 3 * hidden * inner)
    other = layers * (2 * hidden + heads + 2 * kv) + hidden
    stored = matrices + (2 * vocabulary * hidden + other) * 2
    cache = 2 * layers * kv * 2 * 4096
    read = matrices + (vocabulary * hidden + other + hidden) * 2 + cache
    text = re.sub(r"\s+", " ", PAGE.read_text(encoding="utf-8"))
    used, total, speed = (read - cache) / 1e9, read / 1e9, 300e9 / read
    assert f"{stored / 1e9:.2f} GB are stored; a token reads {used:.2f} GB of them (not the embedding)" in text
    assert (
        f"and a cache of {cache / 1e9:.2f} GB, together {total:.2f} GB; 300 GB/s by that is {speed:.0f} tokens" in text
    )
    config = model_config("qwen2-7b")[1]
    assert count_parameters(config).dense == matrices
    plan = make_plan(config, get_device("l4"), device_table.WORKLOAD)
    ours = next(each for each in plan.recipes if each.recipe.name == "int8-weight-only")
    assert ours.itl.seconds == pytest.approx(read / 300e9, rel=1e-9)
