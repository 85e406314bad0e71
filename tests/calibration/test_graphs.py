"""Calibration of other graphs than our exporter's in fp32: 16-bit ones, and those of other exporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qwenforge.calibration import recipes
from qwenforge.calibration.calibrate import calibrate
from qwenforge.calibration.data import CalibrationData
from qwenforge.calibration.pieces import split_by_site
from qwenforge.errors import GraphError
from qwenforge.graph_passes.pipeline import optimize
from qwenforge.graph_passes.quantize.apply import apply_plan
from qwenforge.graph_passes.quantize.sites import find_sites
from support.foreign_graphs import ForeignGraph, foreign_model, tiny_transformers_model
from support.portable_models import portable_model, random_model

MINMAX = recipes.get("int8-w8a8").changed(smoothing=None, activation_range="minmax", expert_floor=4)


def _data(vocabulary: int) -> CalibrationData:
    return CalibrationData(np.random.default_rng(0).integers(0, vocabulary, (3, 24)), "random tokens")


def _largest_inputs(model: Any, data: CalibrationData, layer: int) -> dict[str, float]:
    """The largest magnitude that each projection of a layer is given, by transformers."""
    found: dict[str, float] = {}

    def remember(name: str) -> Any:
        def hook(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0.0), arguments[0].abs().max().item())

        return hook

    for name, module in model.model.layers[layer].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(remember(name))
    with torch.no_grad():
        for row in data.tokens:
            model(torch.from_numpy(row)[None])
    return found


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_graph_of_another_exporter_is_calibrated(kind: Any, tmp_path: Path) -> None:
    graph = ForeignGraph(kind, "dynamo_flat")
    portable = optimize(foreign_model(graph), positions=128).model
    data = _data(96)
    result = calibrate(portable, MINMAX, data, work_folder=tmp_path, require_prediction=False)
    largest = _largest_inputs(tiny_transformers_model(graph), data, layer=1)
    scope = "model.layers.1.self_attn"
    for name in ("q_proj", "o_proj"):
        scale = result.plan.tensors[f"{scope}.{name}.input_scale"].numpy()
        assert scale == pytest.approx(largest[f"self_attn.{name}"] / 127, rel=1e-4)
    if kind == "moe":
        assert [len(each.tokens) for each in result.coverage] == [6, 6]
        assert sum(result.coverage[0].tokens) == 3 * 3 * 24
    apply_plan(portable, result.plan)  # the plan fits the graph it was made of


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16])
def test_16_bit_models_are_calibrated_in_fp32(dtype: ir.DataType, tmp_path: Path) -> None:
    model = random_model("qwen2_moe", rounded_to=dtype.name.lower())
    half = portable_model(model, dtype=dtype)
    data = _data(320)
    result = calibrate(half, MINMAX, data, work_folder=tmp_path, require_prediction=False)
    largest = _largest_inputs(model, data, layer=1)
    found = result.plan.tensors["model.layers.1.self_attn.o_proj.input_scale"].numpy()
    # The rotary tables of the 16-bit graph are rounded, transformers' are not.
    assert found == pytest.approx(largest["self_attn.o_proj"] / 127, rel=1e-2)
    assert half.graph.initializers["model.norm.weight"].dtype == dtype  # the model itself is not changed


def test_pieces_hold_one_layer_each_whatever_nodes_are_called() -> None:
    model = portable_model(random_model("qwen2_moe", num_hidden_layers=3))
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    sites = find_sites(model)
    pieces = split_by_site(model, sites)
    assert sum(len(piece.graph) for piece in pieces) == len(model.graph)
    attentions = [sum(node.op_type == "GroupedQueryAttention" for node in piece.graph) for piece in pieces]
    experts = [sum(node.op_type == "MixtureOfExperts" for node in piece.graph) for piece in pieces]
    assert attentions == experts == [0, 1, 1, 1, 0]
    assert "logits_index" in {value.name for value in pieces[-1].graph.inputs}
    assert not any("logits_index" in {value.name for value in piece.graph.inputs} for piece in pieces[:-1])


def test_graph_without_our_attention_is_refused(tmp_path: Path) -> None:
    graph = foreign_model(ForeignGraph("dense", "dynamo_flat"))
    with pytest.raises(GraphError, match="portable form"):
        calibrate(graph, recipes.get("int8-weight-only"), work_folder=tmp_path)
