"""Static scales of quantized checkpoints as plans: which scale goes where, and what the graph then computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.instantiate import instantiate
from qwenforge.exporter.trace import trace
from qwenforge.graph_passes.pipeline import optimize
from qwenforge.graph_passes.quantize.apply import apply_plan
from qwenforge.graph_passes.quantize.from_checkpoint import plan_from_checkpoint
from qwenforge.graph_passes.quantize.plan import QuantizationPlan
from support.cached_decoder import CachedDecoder, random_tokens
from support.prequantized_checkpoints import write_quantized
from support.prequantized_reference import reference_model
from support.prequantized_styles import STYLES
from support.quantized_reference import fake_quantized
from support.tolerances import FLOAT32_MODEL, QUANTIZED_MODEL

EXAMPLES = Path(__file__).parents[3] / "examples" / "checkpoints"
TOKENS = random_tokens(24, seed=3)


def _portable(checkpoint: Checkpoint) -> ir.Model:
    traced = trace(checkpoint, ir.DataType.FLOAT)
    return instantiate(optimize(traced.model, target="portable", positions=256).model, traced, checkpoint)


def _logits(model: ir.Model) -> np.ndarray[Any, Any]:
    return CachedDecoder(model).step([TOKENS])[0]


def _stored(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        name: float(tensor.reshape(-1)[0])
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.endswith("_scale") and tensor.numel() == 1
    }


def _number(plan: QuantizationPlan, name: str) -> float:
    return float(plan.tensors[name].numpy())


def test_readers_of_one_value_get_the_largest_of_their_scales(tmp_path: Path) -> None:
    folder = write_quantized(EXAMPLES / "tiny-qwen2", tmp_path / "q", STYLES["modelopt-fp8"]())
    checkpoint = Checkpoint.open(folder)
    plan = plan_from_checkpoint(checkpoint, _portable(checkpoint))
    assert plan is not None
    stored = _stored(folder)
    attention = "model.layers.1.self_attn"
    own = [stored[f"{attention}.{name}_proj.input_scale"] for name in "qkv"]
    assert len(set(own)) == 3  # else the test would show nothing
    assert {_number(plan, f"{attention}.{name}_proj.input_scale") for name in "qkv"} == {max(own)}
    assert _number(plan, f"{attention}.o_proj.input_scale") == stored[f"{attention}.o_proj.input_scale"]
    mlp = "model.layers.1.mlp"
    both = max(stored[f"{mlp}.gate_proj.input_scale"], stored[f"{mlp}.up_proj.input_scale"])
    assert _number(plan, f"{mlp}.gate_up_proj.input_scale") == both
    assert "lm_head" not in plan.sites
    keys = plan.tensors[f"{attention}.cache.key_scales"].numpy()
    values = plan.tensors[f"{attention}.cache.value_scales"].numpy()
    assert keys.shape == (2, 32) and (keys == np.float32(0.03)).all()
    assert values.shape == (2,) and (values == np.float32(0.04)).all()


def test_experts_get_one_scale_for_their_tokens_and_their_own_for_what_they_activate(tmp_path: Path) -> None:
    folder = write_quantized(EXAMPLES / "tiny-qwen2-moe", tmp_path / "q", STYLES["compressed-fp8-tensor-static"]())
    checkpoint = Checkpoint.open(folder)
    plan = plan_from_checkpoint(checkpoint, _portable(checkpoint))
    assert plan is not None
    stored = _stored(folder)
    experts = "model.layers.2.mlp.experts"
    tokens = max(stored[f"{experts}.{e}.{part}_proj.input_scale"] for e in range(16) for part in ("gate", "up"))
    expected = [tokens, *(stored[f"{experts}.{e}.down_proj.input_scale"] for e in range(16))]
    np.testing.assert_array_equal(plan.tensors[f"{experts}.activation_scales"].numpy(), np.array(expected, np.float32))
    assert "model.layers.2.mlp.gate" not in plan.sites and "model.layers.2.mlp.shared_expert_gate" not in plan.sites
    assert plan.sites["model.layers.2.mlp.shared_expert.gate_up_proj"].activation == "fp8"


@pytest.mark.parametrize("style", ["gptq-int4-group128", "awq-group128", "compressed-fp8-channel-dynamic"])
def test_checkpoints_without_static_scales_make_no_plan(style: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_quantized(EXAMPLES / "tiny-qwen2", tmp_path / "q", STYLES[style]()))
    assert plan_from_checkpoint(checkpoint, _portable(checkpoint)) is None


@pytest.mark.parametrize(
    ("style", "example"),
    [
        ("plain-fp8-static", "tiny-qwen2"),
        ("compressed-w8a8-static", "tiny-qwen2"),
        ("modelopt-fp8-file-only", "tiny-qwen2-moe"),
    ],
)
def test_the_graph_computes_what_torch_does_with_the_same_scales(style: str, example: str, tmp_path: Path) -> None:
    folder = write_quantized(EXAMPLES / example, tmp_path / "q", STYLES[style]())
    checkpoint = Checkpoint.open(folder)
    model = _portable(checkpoint)
    source = reference_model(EXAMPLES / example, folder)
    import torch

    with torch.no_grad():
        unquantized = source(torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_allclose(_logits(model), unquantized, atol=_bound(unquantized))
    plan = plan_from_checkpoint(checkpoint, model)
    assert plan is not None
    apply_plan(model, plan)
    with torch.no_grad():
        expected = fake_quantized(source, plan)(torch.tensor([TOKENS])).logits[0].numpy()
    ours = _logits(model)
    assert np.linalg.norm(ours - expected) <= QUANTIZED_MODEL * np.linalg.norm(expected)
    # And the scales must have done something that this can see.
    assert np.linalg.norm(ours - expected) <= 0.2 * np.linalg.norm(ours - unquantized)


def _bound(logits: np.ndarray[Any, Any]) -> float:
    """The bound of whole models grows with logits above 64, as rounding errors do."""
    return FLOAT32_MODEL * max(1.0, float(np.abs(logits).max()) / 64)
