"""A portable model with an FP8 cache, whose numbers NumPy cannot hand over, runs whole and in pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwenforge.engine.window_runner import WindowRunner
from qwenforge.exporter.external_data import save_model
from qwenforge.graph_passes.quantize.apply import apply_plan
from support.cached_decoder import random_tokens
from support.portable_models import portable_model, random_model
from support.quantized_reference import Scheme, fake_quantized, make_plan
from support.tolerances import QUANTIZED_MODEL

TOKENS = random_tokens(24, seed=5)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("how", ["pieces", "whole"])
def test_a_model_with_an_fp8_cache_computes_what_torch_does(how: str, tmp_path: Path) -> None:
    import torch

    source = random_model("qwen2", num_hidden_layers=2, **SIZES)
    plan = make_plan(source, Scheme("int8", cache="fp8"))
    model = portable_model(source)
    apply_plan(model, plan)
    if how == "pieces":
        runner = WindowRunner.in_fp32(model, tmp_path)
    else:
        save_model(model, tmp_path / "model.onnx")
        runner = WindowRunner.from_file(tmp_path / "model.onnx", whole=True)
    (ours,) = runner.logits(np.array([TOKENS], np.int64))
    with torch.no_grad():
        expected = fake_quantized(source, plan)(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.linalg.norm(ours - expected) <= QUANTIZED_MODEL * np.linalg.norm(expected)
