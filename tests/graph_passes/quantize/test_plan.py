"""A plan survives its files, and damaged ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.errors import UserError
from qwenforge.graph_passes.quantize.plan import CachePlan, QuantizationPlan, SitePlan


def small_plan() -> QuantizationPlan:
    return QuantizationPlan(
        recipe="int4-weight-only",
        sites={
            "model.layers.0.self_attn.q_proj": SitePlan(weight="int4", group_size=32),
            "lm_head": SitePlan(weight=None, reason="kept by default"),
        },
        caches={"model.layers.0.self_attn.cache": CachePlan(format="int8")},
        smoothed=("model.layers.0.input_layernorm",),
        tensors={
            "model.layers.0.self_attn.q_proj.weight_scales": ir.tensor(np.full((4, 2), 0.5, np.float32)),
            "model.layers.0.self_attn.q_proj.weight_codes": ir.tensor(np.arange(8, dtype=np.int8).reshape(2, 4)),
        },
    )


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    plan = small_plan()
    plan.save(tmp_path)
    plan.save(tmp_path)  # replaces
    loaded = QuantizationPlan.load(tmp_path)
    assert (loaded.recipe, loaded.sites, loaded.caches, loaded.smoothed) == (
        plan.recipe,
        plan.sites,
        plan.caches,
        plan.smoothed,
    )
    assert {name: tensor.numpy().tolist() for name, tensor in loaded.tensors.items()} == {
        name: tensor.numpy().tolist() for name, tensor in plan.tensors.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]


@pytest.mark.parametrize(
    ("old", "new"),
    [('"version": 1', '"version": 2'), ('"recipe"', '"recipes"'), ('"int4"', '"int3"'), ("{", "")],
)
def test_damaged_plan_is_refused(tmp_path: Path, old: str, new: str) -> None:
    small_plan().save(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=r"plan\.json is not a quantization plan"):
        QuantizationPlan.load(tmp_path)


def test_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="calibrate again"):
        QuantizationPlan.load(tmp_path)
