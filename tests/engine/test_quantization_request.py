"""What ``export --quantize`` refuses before any work, because the target would refuse it after hours of it."""

from __future__ import annotations

import sys

import pytest

from qwenforge.calibration import recipes
from qwenforge.engine.export import export_checkpoint
from qwenforge.engine.quantization_request import quantization_request, require_target
from qwenforge.errors import UnsupportedError
from qwenforge.lowering_choice import choose
from support.source_tree import ROOT

DENSE = ROOT / "examples" / "checkpoints" / "tiny-qwen2"


@pytest.mark.parametrize(
    ("recipe", "cache", "target", "message"),
    [
        ("fp8", None, "ort-cpu", "no FP8 products on a CPU; use int8-w8a8"),
        ("int4-weight-only", "int8", "ort-cpu", "no 8-bit caches on a CPU"),
        ("int8-w8a8", None, "ort-cuda", "no kernels for recipe int8-w8a8"),
        ("fp8", None, "ort-cuda", "--target tensorrt"),
        ("int8-weight-only", "fp8", "ort-cuda", "add --attention plugin"),
    ],
)
def test_recipe_that_a_target_cannot_run_is_refused(recipe: str, cache: None, target: str, message: str) -> None:
    chosen = recipes.get(recipe).changed(cache=cache)
    with pytest.raises(UnsupportedError, match=message):
        require_target(chosen, target, choose(target))


def test_override_counts_as_the_recipe_does() -> None:
    chosen = recipes.get("int4-weight-only").override("lm_head=fp8")
    with pytest.raises(UnsupportedError, match="no FP8 products"):
        require_target(chosen, "ort-cpu", None)


@pytest.mark.parametrize(
    ("recipe", "cache", "target", "device"),
    [
        ("int8-w8a8", None, "ort-cpu", None),
        ("int4-weight-only", None, "ort-cuda", None),
        ("fp8", None, "tensorrt", "h100"),
        ("int4-weight-only", "int8", "tensorrt", "jetson-orin-nano"),
        ("fp8", "fp8", "portable", None),
    ],
)
def test_recipe_that_a_target_can_run_passes(recipe: str, cache: None, target: str, device: str | None) -> None:
    version = "10.3" if device == "jetson-orin-nano" else None
    require_target(recipes.get(recipe).changed(cache=cache), target, choose(target, device=device, version=version))


def test_missing_plots_are_missed_before_any_work(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        export_checkpoint(DENSE, f"{tmp_path}/bundle", quantization=quantization_request("int8-weight-only"))
