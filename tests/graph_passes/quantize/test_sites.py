"""The sites of graphs from our exporter, from a second producer and from others' exporters."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.graph_passes.pipeline import optimize
from qwenforge.graph_passes.quantize.sites import find_sites
from qwenforge.graph_passes.segments import split_by_layer
from support.checkpoints import Kind
from support.foreign_graphs import ForeignGraph, foreign_model
from support.portable_models import portable_model, random_model

DENSE = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]


def names_of(model: ir.Model, layer: int) -> set[str]:
    prefix = f"model.layers.{layer}."
    found = find_sites(model)
    every = [*found.linear, *found.experts, *found.caches]
    return {name.removeprefix(prefix) for name in every if name.startswith(prefix)}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_dense_layers_have_their_projections(kind: Kind) -> None:
    model = portable_model(random_model(kind))
    expected = {*DENSE, "mlp.gate_up_proj", "mlp.down_proj", "self_attn.cache"}
    assert names_of(model, 0) == names_of(model, 1) == expected
    assert find_sites(model).unknown == ()
    assert find_sites(model).linear["lm_head"].role == "vocabulary"


def test_routed_layers_have_experts_a_router_and_a_shared_expert() -> None:
    model = portable_model(random_model("qwen2_moe"))
    shared = {"mlp.shared_expert.gate_up_proj", "mlp.shared_expert.down_proj", "mlp.shared_expert_gate"}
    assert names_of(model, 0) == {*DENSE, *shared, "mlp.gate", "mlp.experts", "self_attn.cache"}
    roles = {name: site.role for name, site in find_sites(model).linear.items()}
    assert roles["model.layers.0.mlp.gate"] == "router"
    assert roles["model.layers.0.mlp.shared_expert_gate"] == "shared_gate"


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_moe", "qwen3_moe"])
def test_pieces_have_the_sites_of_the_whole(kind: Kind) -> None:
    model = portable_model(random_model(kind))
    whole = find_sites(model)
    pieces = [find_sites(piece) for piece in split_by_layer(model)]
    assert [name for piece in pieces for name in piece.linear] == list(whole.linear)
    assert [name for piece in pieces for name in piece.experts] == list(whole.experts)


def test_weights_are_those_of_the_named_modules() -> None:
    reference = random_model("qwen2")
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    for name, site in find_sites(portable_model(reference)).linear.items():
        if name.endswith("gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            expected = np.concatenate([state[f"{prefix}gate_proj.weight"], state[f"{prefix}up_proj.weight"]])
        else:
            expected = state[f"{name}.weight"]
        assert np.array_equal(site.weight.numpy().T, expected), name


@pytest.mark.parametrize(("foreign", "kind"), [("dense", "qwen2"), ("moe", "qwen2_moe")])
def test_foreign_graphs_have_the_same_sites(foreign: Literal["dense", "moe"], kind: Kind) -> None:
    graph = ForeignGraph(kind=foreign)
    found = find_sites(optimize(foreign_model(graph)).model)
    ours = find_sites(portable_model(random_model(kind)))
    assert set(found.linear) == set(ours.linear)
    assert set(found.experts) == set(ours.experts) and set(found.caches) == set(ours.caches)
    assert found.unknown == ()
