"""Calibration of whole models: numbers against transformers, recipes against each other, and planted trouble."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qwenforge.calibration import recipes
from qwenforge.calibration.calibrate import CalibrationResult, calibrate
from qwenforge.calibration.data import CalibrationData
from qwenforge.calibration.recipes import Recipe
from qwenforge.errors import UserError
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.graph_passes.quantize.apply import apply_plan
from support.tolerances import FLOAT32_MODEL
from support.trained_models import (
    CHECKPOINTS,
    calibration_rows,
    kl_after,
    trained_checkpoint,
    trained_model,
)

DENSE, SPARSE = "tiny-qwen2", "tiny-qwen2-moe"


def _calibrated(name: str, recipe: Recipe, folder: Path, **arguments: Any) -> CalibrationResult:
    data = calibration_rows(name) if recipe.needs_data else None
    return calibrate(trained_model(name), recipe, data, **{"work_folder": folder} | arguments)


def _kl(name: str, recipe: Recipe, folder: Path) -> float:
    result = _calibrated(name, recipe, folder)
    return kl_after(name, lambda model: apply_plan(model, result.plan))


def _w8a8_kl(name: str, rows: int, strength: float | None, folder: Path) -> float:
    recipe = recipes.get("int8-w8a8").changed(smoothing_strength=strength)
    plan = calibrate(trained_model(name), recipe, calibration_rows(name, rows), work_folder=folder).plan
    return kl_after(name, functools.partial(apply_plan, plan=plan))


def _changed(name: str, folder: Path, changes: dict[str, Any]) -> Checkpoint:
    """A copy of a checkpoint with some tensors replaced by functions of themselves."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(CHECKPOINTS / name, folder)
    left = set(changes)
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        for tensor in left & set(state):
            state[tensor] = changes[tensor](state[tensor].clone()).contiguous()
        left -= set(state)
        save_file(state, path, metadata={"format": "pt"})
    assert not left
    return Checkpoint.open(folder)


class _Hooked:
    """A transformers model that remembers what its modules were given, largest magnitudes by channel."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.largest: dict[str, torch.Tensor] = {}
        for module_name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(self._remember(module_name))

    def _remember(self, name: str) -> Any:
        def hook(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            found = arguments[0].abs().flatten(0, -2).amax(0)
            self.largest[name] = torch.maximum(self.largest.get(name, torch.zeros_like(found)), found)

        return hook

    def run(self, data: CalibrationData) -> tuple[Any, float]:
        """The caches of each row, and the mean loss."""
        caches, total = [], []
        with torch.no_grad():
            for row in data.tokens:
                tokens = torch.from_numpy(row)[None]
                output = self.model(tokens, use_cache=True)
                caches.append(output.past_key_values)
                loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], tokens[0, 1:])
                total.append(loss.item())
        return caches, float(np.mean(total))


@pytest.fixture(scope="module")
def hooked() -> tuple[_Hooked, Any, float]:
    reference = _Hooked(CHECKPOINTS / DENSE)
    caches, loss = reference.run(calibration_rows(DENSE))
    return reference, caches, loss


def test_input_and_cache_scales_are_those_of_transformers_activations(
    hooked: tuple[_Hooked, Any, float], tmp_path: Path
) -> None:
    reference, caches, _ = hooked
    recipe = recipes.get("int8-w8a8").changed(
        smoothing=None, activation_range="minmax", cache="int8", overrides=(recipes.parse_override("lm_head=recipe"),)
    )
    result = _calibrated(DENSE, recipe, tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in result.plan.tensors.items()}
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        expected = reference.largest[name].max().item() / 127
        assert tensors[f"{name}.input_scale"] == pytest.approx(expected, rel=1e-4)
    expected = reference.largest["lm_head"].max().item() / 127
    assert tensors["lm_head.input_scale"] == pytest.approx(expected, rel=1e-4)
    gate = reference.largest["model.layers.1.mlp.gate_proj"].max().item() / 127
    assert tensors["model.layers.1.mlp.gate_up_proj.input_scale"] == pytest.approx(gate, rel=1e-4)
    for layer in range(3):
        keys = torch.stack([cache.layers[layer].keys for cache in caches]).abs().amax((0, 1, 3)) / 127
        values = torch.stack([cache.layers[layer].values for cache in caches]).abs().amax((0, 1, 3, 4)) / 127
        scope = f"model.layers.{layer}.self_attn.cache"
        np.testing.assert_allclose(tensors[f"{scope}.key_scales"], keys.numpy(), rtol=1e-3)
        np.testing.assert_allclose(tensors[f"{scope}.value_scales"], values.numpy(), rtol=1e-3)
    assert result.plan.caches.keys() == {f"model.layers.{layer}.self_attn.cache" for layer in range(3)}
    assert result.mean_loss is not None


def test_mean_loss_is_transformers_on_the_rows_it_measures(hooked: tuple[_Hooked, Any, float], tmp_path: Path) -> None:
    recipe = recipes.get("fp8").override("lm_head=recipe")  # its input is wanted, so that every row is measured
    result = _calibrated(DENSE, recipe, tmp_path)
    assert result.mean_loss == pytest.approx(hooked[2], abs=FLOAT32_MODEL)


def test_smoothing_factors_are_equation_4_of_transformers_activations(
    hooked: tuple[_Hooked, Any, float], tmp_path: Path
) -> None:
    reference, _, _ = hooked
    result = _calibrated(DENSE, recipes.get("int8-w8a8").changed(smoothing_strength=0.5), tmp_path)
    layer = reference.model.model.layers[1]
    modules = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    columns = torch.stack([module.weight.abs().amax(0) for module in modules]).amax(0)
    expected = (reference.largest["model.layers.1.self_attn.q_proj"] / columns).sqrt()
    found = result.plan.tensors["model.layers.1.input_layernorm.smoothing"].numpy()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-3)


@pytest.mark.parametrize("checkpoint", [DENSE, SPARSE])
@pytest.mark.parametrize("rows", [4, 16])
def test_searched_strength_is_not_worse_than_one_half_with_little_text(
    rows: int, checkpoint: str, tmp_path: Path
) -> None:
    """Largest magnitudes of few tokens are soon exceeded, and strengths near 1 rely on them: judged on the tokens that
    gave them they look best, and cost 1.4 times the KL of 0.5 with 16 rows. Hence one half judges the other. The tenth
    allowed here is about one standard error of a KL on so few windows."""
    searched, half = (_w8a8_kl(checkpoint, rows, strength, tmp_path / str(strength)) for strength in (None, 0.5))
    assert searched < 1.1 * half


def test_searched_strength_is_better_than_one_half_with_more_text(tmp_path: Path) -> None:
    searched, half = (_w8a8_kl(DENSE, 64, strength, tmp_path / str(strength)) for strength in (None, 0.5))
    assert searched < half


def test_int4_with_search_is_better_than_round_to_nearest(tmp_path: Path) -> None:
    recipe = recipes.get("int4-weight-only").changed(group_size=64)
    awq = recipe.changed(rounding="nearest")
    plain = _kl(DENSE, awq.changed(smoothing=None, clipping=False), tmp_path / "plain")
    searched = _kl(DENSE, awq, tmp_path / "awq")
    assert searched < 0.9 * plain
    assert _kl(DENSE, recipe, tmp_path / "compensated") < 0.75 * searched


@pytest.mark.parametrize("name", ["int8-w8a8", "int8-weight-only", "int4-weight-only", "fp8"])
@pytest.mark.parametrize("checkpoint", [DENSE, SPARSE])
def test_recipes_stay_near_the_float_model(name: str, checkpoint: str, tmp_path: Path) -> None:
    bound = {"int8-w8a8": 0.01, "int8-weight-only": 0.001, "int4-weight-only": 0.05, "fp8": 0.01}[name]
    assert _kl(checkpoint, recipes.get(name), tmp_path) < bound


def test_outlier_channel_x1000_is_named_and_smoothed(tmp_path: Path) -> None:
    """A norm's channel times 1000, its readers' columns divided by as much: the same function, with an outlier."""
    scope = "model.layers.1"

    def planted(columns: torch.Tensor) -> torch.Tensor:
        columns[:, 5] /= 1024
        return columns

    def raised(norm: torch.Tensor) -> torch.Tensor:
        norm[5] *= 1024
        return norm

    readers = dict.fromkeys((f"{scope}.self_attn.{kind}_proj.weight" for kind in "qkv"), planted)
    checkpoint = _changed(DENSE, tmp_path / "checkpoint", readers | {f"{scope}.input_layernorm.weight": raised})
    found: dict[bool, float] = {}
    for smooth in (True, False):
        recipe = recipes.get("int8-w8a8").changed(activation_range="minmax")
        recipe = recipe if smooth else recipe.changed(smoothing=None)
        folder = tmp_path / f"work-{smooth}"
        result = calibrate(trained_model(DENSE, checkpoint), recipe, calibration_rows(DENSE), work_folder=folder)
        outlier = next(each for each in result.outliers if each.of == "input")
        assert (outlier.site, outlier.channel) == (f"{scope}.self_attn.q_proj", 5)
        assert 100 < outlier.ratio < 10_000
        assert any(f"channel 5 of {scope}.self_attn.q_proj's input" in warning for warning in result.warnings)
        changed = trained_model(DENSE, checkpoint)
        apply_plan(changed, result.plan)
        found[smooth] = kl_after(DENSE, lambda model, changed=changed: _take_weights(model, changed))
    assert found[True] < 0.01
    assert found[False] > 20 * found[True]


def _take_weights(model: ir.Model, other: ir.Model) -> None:
    """Make ``model`` the graph of ``other``."""
    model.graph = other.graph


@pytest.mark.parametrize("recipe", ["int8-weight-only", "int4-weight-only"])
def test_nan_weight_is_named(recipe: str, tmp_path: Path) -> None:
    def damage(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 4] = float("nan")
        return tensor

    name = "model.layers.2.mlp.up_proj.weight"
    checkpoint = _changed(DENSE, tmp_path / "checkpoint", {name: damage})
    data = None if recipe == "int8-weight-only" else calibration_rows(DENSE)
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.up_proj\.weight.*NaN or infinity"):
        calibrate(trained_model(DENSE, checkpoint), recipes.get(recipe), data, work_folder=tmp_path / "work")


def test_activations_beyond_fp32_are_named(tmp_path: Path) -> None:
    scope = "model.layers.1.mlp"
    checkpoint = _changed(
        DENSE,
        tmp_path / "checkpoint",
        {f"{scope}.up_proj.weight": lambda tensor: tensor * 1e25, f"{scope}.gate_proj.weight": lambda t: t * 1e25},
    )
    with pytest.raises(UserError, match=r"the input of model\.layers\.1\.mlp\.down_proj is NaN or infinite"):
        calibrate(
            trained_model(DENSE, checkpoint),
            recipes.get("fp8"),
            calibration_rows(DENSE),
            work_folder=tmp_path / "work",
        )


def test_wrong_tokenizer_is_refused_by_what_the_model_predicts(tmp_path: Path) -> None:
    data = calibration_rows(DENSE)
    shuffled = np.random.default_rng(0).permutation(2048)[data.tokens]
    wrong = CalibrationData(shuffled, "shuffled.txt")
    with pytest.raises(UserError, match=r"predicts shuffled\.txt no better than chance.*tokenizer"):
        calibrate(trained_model(DENSE), recipes.get("fp8"), wrong, work_folder=tmp_path / "work")
    result = calibrate(
        trained_model(DENSE), recipes.get("fp8"), wrong, work_folder=tmp_path / "work", require_prediction=False
    )
    assert any("no better than chance" in warning for warning in result.warnings)


def test_recipe_that_needs_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs calibration text"):
        calibrate(trained_model(DENSE), recipes.get("fp8"), None, work_folder=tmp_path)


def test_overrides_and_kept_sites_reach_the_plan(tmp_path: Path) -> None:
    recipe = recipes.get("int4-weight-only").override("model.layers.0.*=keep", "*.down_proj=int8")
    result = _calibrated(DENSE, recipe, tmp_path)
    sites = result.plan.sites
    assert sites["model.layers.0.self_attn.q_proj"].weight is None
    assert sites["model.layers.0.mlp.down_proj"].weight == "int8"
    assert sites["lm_head"].weight is None and "default" in sites["lm_head"].reason
    assert not any(name.startswith("model.layers.0.self_attn") for name in result.plan.tensors)
    assert trained_checkpoint(DENSE).config.num_hidden_layers == 3
