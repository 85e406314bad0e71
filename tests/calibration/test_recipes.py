"""Recipes: names, JSON round trip, refusals, and the choice for each site."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenforge.calibration import recipes
from qwenforge.errors import UserError


@pytest.mark.parametrize("name", recipes.NAMES)
def test_recipe_round_trips_through_json(name: str, tmp_path: Path) -> None:
    recipe = recipes.get(name).override("lm_head=int8", "model.layers.0.*=keep").changed(cache="fp8")
    path = tmp_path / "mine.json"
    path.write_text(recipe.to_json())
    assert recipes.get(str(path)) == recipe
    assert recipes.from_json(recipe.to_json()) == recipe


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipes.get("fp8").weight = "int8"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unknown": 1}, "unknown"),
        ({"version": 2}, "version"),
        ({"group_size": 64}, "weight_granularity"),
        ({"weight": "int3"}, "weight"),
        ({"weight": "int4"}, "group"),
        ({"smoothing_strength": 1.5}, "smoothing_strength"),
        ({"activation": "fp8"}, "fp8 weights"),
        ({"cache": "int4"}, "cache"),
        ({"expert_floor": "many"}, "expert_floor"),
    ],
)
def test_recipe_refuses_what_it_does_not_know(change: dict[str, object], said: str) -> None:
    fields = json.loads(recipes.get("int8-weight-only").to_json()) | change
    with pytest.raises(UserError, match=said):
        recipes.from_json(json.dumps(fields), "mine.json")


def test_get_names_the_recipes_there_are() -> None:
    with pytest.raises(UserError, match="int8-w8a8, int8-weight-only, int4-weight-only, fp8"):
        recipes.get("int2")


def test_load_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.json"):
        recipes.load(tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(UserError, match=r"mine\.json.*JSON"):
        recipes.load(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("text", "action", "group"),
    [("lm_head=int8", "int8", None), ("model.layers.0.*=keep", "keep", None), ("*.down_proj=int4:64", "int4", 64)],
)
def test_parse_override_reads_pattern_action_and_group(text: str, action: str, group: int | None) -> None:
    override = recipes.parse_override(text)
    assert (override.pattern, override.action, override.group_size) == (text.partition("=")[0], action, group)
    assert str(override) == text


@pytest.mark.parametrize("text", ["lm_head", "=keep", "lm_head=int5", "lm_head=keep:4", "lm_head=int4:x", "a=int4:0"])
def test_parse_override_refuses_other_forms(text: str) -> None:
    with pytest.raises(UserError, match="PATTERN=ACTION"):
        recipes.parse_override(text)


def test_choose_keeps_roles_and_the_last_override_counts() -> None:
    recipe = recipes.get("int4-weight-only").override("model.layers.0.*=keep", "*.0.mlp.*=int8", "lm_head=recipe")
    assert recipe.choose("model.layers.1.self_attn.q_proj", "qkv").weight == "int4"
    assert recipe.choose("model.layers.1.self_attn.q_proj", "qkv").group_size == 128
    assert recipe.choose("model.layers.0.self_attn.q_proj", "qkv").weight is None
    assert recipe.choose("model.layers.0.mlp.down_proj", "mlp_output").weight == "int8"
    assert recipe.choose("model.layers.1.mlp.gate", "router").weight is None
    assert recipe.choose("lm_head", "vocabulary").weight == "int4"
    assert recipes.get("fp8").choose("model.layers.1.mlp.experts", "experts").activation == "fp8"


def test_override_of_no_site_is_refused() -> None:
    recipe = recipes.get("fp8").override("model.layer.0.*=keep")
    with pytest.raises(UserError, match=r"model\.layer\.0.*no site.*q_proj"):
        recipes.require_matches(recipe, ["model.layers.0.self_attn.q_proj"])


def test_weight_only_int8_needs_no_text() -> None:
    assert [name for name in recipes.NAMES if not recipes.get(name).needs_data] == ["int8-weight-only"]
    assert recipes.get("int8-weight-only").changed(cache="int8").needs_data
