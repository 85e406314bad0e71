"""Layers and distributions of a quantized model against the unquantized one, with errors whose place is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.calibration import recipes
from qwenforge.calibration.accuracy import LayerAccuracy, worst_layers
from qwenforge.calibration.heldout import HeldOutText
from qwenforge.engine.accuracy_run import AccuracyRun, compare_layers, measure
from qwenforge.engine.window_runner import WindowRunner
from qwenforge.errors import VerificationError
from qwenforge.exporter.external_data import save_model
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.quantize.apply import apply_plan
from support.exported_models import SPARSE, Exported, exported
from support.rtn_plan import rtn_plan, scale_wrongly
from support.tolerances import FLOAT32_MODEL

WINDOWS = np.random.default_rng(0).integers(0, 256, (3, 24))
Change = Callable[[str, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def sparse() -> Exported:
    return exported("qwen2_moe", **SPARSE)


def quantized(model: Exported, change: Change | None = None, recipe: str = "int8-weight-only") -> ir.Model:
    portable = model.portable()
    apply_plan(portable, rtn_plan(portable, recipes.get(recipe), change=change))
    return portable


def saved(model: ir.Model, folder: Path) -> Path:
    folder.mkdir()
    save_model(model, folder / "model.onnx")
    return folder / "model.onnx"


def layers(model: Exported, folder: Path, change: Change | None = None) -> list[LayerAccuracy]:
    folder.mkdir()
    reference = WindowRunner.from_file(saved(model.portable(), folder / "reference"), whole=False)
    return compare_layers(reference, WindowRunner.in_fp32(quantized(model, change), folder), WINDOWS)


def run(
    model: Exported, folder: Path, *, whole: bool = True, made: Callable[[], ir.Model] | None = None
) -> AccuracyRun:
    """The measurement of what ``made`` makes, by default of ``model`` at int8."""
    made = made or (lambda: quantized(model))
    folder.mkdir()
    reference = saved(model.portable(), folder / "reference")
    lowered = saved(lower(made(), "ort-cpu"), folder / "lowered")
    return measure(
        reference,
        [lowered],
        made(),
        HeldOutText(WINDOWS, "random tokens"),
        whole=whole,
        upcast_reference=False,
        upcast_quantized=False,
        session_options={},
        work_folder=folder,
    )


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "pieces"])
def test_logits_of_windows_are_those_of_transformers(sparse: Exported, tmp_path: Path, whole: bool) -> None:
    import torch

    path = saved(sparse.portable(), tmp_path / "model")
    with torch.no_grad():
        expected = sparse.reference()(torch.from_numpy(WINDOWS)).logits.numpy()
    found = np.stack(list(WindowRunner.from_file(path, whole=whole).logits(WINDOWS)))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < FLOAT32_MODEL
    assert sorted(each.name for each in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_whole_models_and_pieces_give_the_same_figures(sparse: Exported, tmp_path: Path) -> None:
    first, second = run(sparse, tmp_path / "a", whole=True), run(sparse, tmp_path / "b", whole=False)
    assert (first.method, second.method) == ("whole-model", "layer-by-layer")
    assert first.layers == second.layers
    assert first.distributions.mean_kl == pytest.approx(second.distributions.mean_kl, rel=1e-2)
    assert first.distributions.perplexity == pytest.approx(second.distributions.perplexity, rel=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_own_error_is_only_where_the_fault_is_and_accumulated_error_goes_on(
    sparse: Exported, tmp_path: Path, layer: int
) -> None:
    site = f"model.layers.{layer}.self_attn.o_proj"
    clean = layers(sparse, tmp_path / "clean")
    spoilt = layers(sparse, tmp_path / "spoilt", lambda name, scales: 40 * scales if name == site else scales)
    assert worst_layers(spoilt)[0].name == f"model.layers.{layer}"
    for index, (good, bad) in enumerate(zip(clean, spoilt, strict=True)):
        if index == layer:
            assert bad.own_sqnr_db < good.own_sqnr_db - 10
        else:
            assert bad.own_sqnr_db == good.own_sqnr_db
        assert (bad.sqnr_db < good.sqnr_db - 5) == (index >= layer)


def test_values_that_are_not_finite_are_traced_to_the_first_layer_that_makes_them(
    sparse: Exported, tmp_path: Path
) -> None:
    def overflowing() -> ir.Model:
        model = quantized(sparse)
        scale_wrongly(model, "model.layers.1.mlp.shared_expert.down_proj", 3e38)
        return model

    with pytest.raises(VerificationError, match=r"model in window 1 are not finite \(first in model\.layers\.1\)"):
        run(sparse, tmp_path / "run", made=overflowing)


def test_the_same_text_gives_the_same_bits(sparse: Exported, tmp_path: Path) -> None:
    assert run(sparse, tmp_path / "a") == run(sparse, tmp_path / "b")
