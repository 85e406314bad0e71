"""Experts: which tokens they are given, scales of their own, and the fall back of those that are given too few."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwenforge.calibration import recipes
from qwenforge.calibration.calibrate import CalibrationResult, calibrate
from qwenforge.calibration.data import CalibrationData
from qwenforge.calibration.experts import hidden
from qwenforge.exporter.checkpoint import Checkpoint
from support.trained_models import CHECKPOINTS, calibration_rows, trained_model

NAME = "tiny-qwen2-moe"
DEAD = 5
LAYER = "model.layers.1.mlp"


class _Routed:
    """What each expert of a layer of a transformers model is given and makes of it, by hooks and float64.

    Rows of text with a token for the dead expert are left out of ``data``: the mean of 15 logits can be a large one.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.experts = model.model.layers[1].mlp.experts
        self._inputs: list[torch.Tensor] = []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda _, given: self._inputs.append(given[0][0]))
        with torch.no_grad():
            for row in calibration_rows(NAME).tokens:
                model(torch.from_numpy(row)[None])
        router = model.model.layers[1].mlp.gate.weight.detach()
        chosen = [(tokens @ router.T).softmax(-1).topk(4).indices for tokens in self._inputs]
        kept = [index for index, each in enumerate(chosen) if not (each == DEAD).any()]
        self.data = CalibrationData(calibration_rows(NAME).tokens[kept], "text for all experts but one")
        self.tokens = torch.cat([self._inputs[index] for index in kept])
        self.chosen = torch.cat([chosen[index] for index in kept])

    def given(self, expert: int) -> torch.Tensor:
        return self.tokens[(self.chosen == expert).any(1)].double()

    def hidden(self, expert: int) -> torch.Tensor:
        gate, up = (self.given(expert) @ self.experts.gate_up_proj[expert].double().T).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with an expert in layer 1 that never is among the four best: the mean of all others."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("planted") / NAME
    shutil.copytree(CHECKPOINTS / NAME, folder)
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        if f"{LAYER}.gate.weight" in state:
            router = state[f"{LAYER}.gate.weight"].float()
            router[DEAD] = router[torch.arange(16) != DEAD].mean(0)
            state[f"{LAYER}.gate.weight"] = router.bfloat16()
        save_file(state, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def reference(planted: Path) -> _Routed:
    return _Routed(planted)


def _calibrate(planted: Path, data: CalibrationData, folder: Path, recipe: recipes.Recipe) -> CalibrationResult:
    model = trained_model(NAME, Checkpoint.open(planted))
    return calibrate(model, recipe, data, work_folder=folder)


@pytest.fixture(scope="module")
def fp8(planted: Path, reference: _Routed, tmp_path_factory: pytest.TempPathFactory) -> CalibrationResult:
    return _calibrate(planted, reference.data, tmp_path_factory.mktemp("fp8"), recipes.get("fp8"))


def test_coverage_is_transformers_routing(fp8: CalibrationResult, reference: _Routed) -> None:
    coverage = next(each for each in fp8.coverage if each.site == f"{LAYER}.experts")
    assert list(coverage.tokens) == [int((reference.chosen == expert).sum()) for expert in range(16)]
    assert sum(coverage.tokens) == 4 * reference.data.tokens.size >= 4 * 14 * 256


def test_dead_expert_is_named(fp8: CalibrationResult) -> None:
    coverage = next(each for each in fp8.coverage if each.site == f"{LAYER}.experts")
    assert coverage.dead == (DEAD,)
    assert any(f"experts of {LAYER}.experts that no token was given to: {DEAD}" in each for each in fp8.warnings)


def test_each_expert_has_the_activation_range_of_its_own_tokens(fp8: CalibrationResult, reference: _Routed) -> None:
    scales = fp8.plan.tensors[f"{LAYER}.experts.activation_scales"].numpy()
    assert scales.shape == (17,)
    assert scales[0] == pytest.approx(reference.tokens.abs().max().item() / 448, rel=1e-4)
    for expert in range(16):
        if expert != DEAD:
            expected = reference.hidden(expert).abs().max().item() / 448
            assert scales[1 + expert] == pytest.approx(expected, rel=1e-3)


def test_dead_expert_s_range_follows_from_its_weights(fp8: CalibrationResult, reference: _Routed) -> None:
    scales = fp8.plan.tensors[f"{LAYER}.experts.activation_scales"].numpy()[1:]
    gate, up = reference.experts.gate_up_proj.double().norm(dim=-1).chunk(2, -1)
    reach = (gate * up).amax(-1).detach().numpy()
    others = np.delete(scales / reach, DEAD)
    assert scales[DEAD] == pytest.approx(others.max() * reach[DEAD], rel=1e-3)


def test_experts_have_scales_of_their_own_rows(fp8: CalibrationResult, reference: _Routed) -> None:
    found = fp8.plan.tensors[f"{LAYER}.experts.down_scales"].numpy()
    expected = reference.experts.down_proj.detach().abs().amax(-1, keepdim=True) / 448
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_experts_below_the_floor_are_quantized_by_their_weights_alone(
    planted: Path, reference: _Routed, tmp_path: Path
) -> None:
    counts = [int((reference.chosen == expert).sum()) for expert in range(16)]
    floor = sorted(counts)[3]
    recipe = recipes.get("int4-weight-only").changed(expert_floor=floor, group_size=32)
    result = _calibrate(planted, reference.data, tmp_path, recipe)
    few = tuple(expert for expert, count in enumerate(counts) if count < floor)
    assert DEAD in few and len(few) >= 2
    coverage = next(each for each in result.coverage if each.site == f"{LAYER}.experts")
    assert coverage.below_floor == few
    assert any(f"fewer than {floor} tokens" in each and f": {few[0]}" in each for each in result.warnings)
    factors = result.plan.tensors[f"{LAYER}.experts.smoothing"].numpy()
    scales = result.plan.tensors[f"{LAYER}.experts.down_scales"].numpy()
    weight = reference.experts.down_proj.detach().reshape(16, 128, 4, 32)
    unclipped = (weight.abs().amax(-1) / 7).numpy()
    for expert in range(16):
        # Scales are rounded to float16's numbers; a clipped one is a fortieth smaller at least.
        own = np.allclose(factors[expert], 1) and np.allclose(scales[expert], unclipped[expert], rtol=2.0**-11)
        assert own == (expert in few)


def test_hidden_is_silu_times_up() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(9, 24, generator=generator) * 30
    weight = torch.randn(32, 24, generator=generator)
    gate, up = (inputs.double() @ weight.double().T).chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    np.testing.assert_allclose(hidden(inputs.numpy(), weight.numpy()), expected.numpy(), rtol=1e-4, atol=1e-2)


def test_text_too_short_for_any_expert_still_gives_ranges(planted: Path, reference: _Routed, tmp_path: Path) -> None:
    recipe: Any = recipes.get("fp8").changed(expert_floor=1_000_000)
    result = _calibrate(planted, reference.data, tmp_path, recipe)
    scales = result.plan.tensors[f"{LAYER}.experts.activation_scales"].numpy()
    assert (scales > 0).all() and len(np.unique(scales)) == 17
    assert sum("16 of 16 experts" in warning for warning in result.warnings) == 3
