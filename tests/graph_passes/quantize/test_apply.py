"""Plans applied to whole portable models, against PyTorch's float64 model with the same quantization."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.errors import GraphError
from qwenforge.exporter import weights
from qwenforge.exporter.quantized_weights import as_quantized
from qwenforge.graph_passes.quantize.apply import apply_plan
from qwenforge.graph_passes.quantize.plan import QuantizationPlan, SitePlan
from qwenforge.graph_passes.quantize.sites import KEPT_BY_DEFAULT, find_sites
from support.cached_decoder import CachedDecoder, random_tokens
from support.checkpoints import Kind
from support.portable_models import portable_model, random_model
from support.quantized_reference import Scheme, fake_quantized, make_plan
from support.tolerances import FLOAT32_MODEL, QUANTIZED_MODEL

TOKENS = random_tokens(24, seed=5)

WEIGHT_ONLY = [Scheme("int8"), Scheme("int4", 32), Scheme("uint4", 16), Scheme("fp8"), Scheme("int8", smooth=True)]
WITH_ACTIVATIONS = [Scheme("int8", activation="int8", smooth=True), Scheme("fp8", activation="fp8")]
MODELS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "dense": ("qwen2", {}),
    "shared": ("qwen2_moe", {}),
    "sparse": ("qwen3_moe", {}),
}


def _logits(model: ir.Model) -> np.ndarray[Any, Any]:
    return CachedDecoder(model).step([TOKENS])[0]


def _expected(model: Any) -> np.ndarray[Any, Any]:
    import torch

    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()  # type: ignore[no-any-return]


def _id(scheme: Scheme) -> str:
    return "-".join(str(part) for part in dataclasses.astuple(scheme)[:4] if part)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", WEIGHT_ONLY, ids=_id)
def test_the_graph_computes_the_fake_quantized_model_weights_only(name: str, scheme: Scheme) -> None:
    kind, config = MODELS[name]
    source = random_model(kind, **config)
    plan = make_plan(source, scheme)
    model = portable_model(source)
    apply_plan(model, plan)
    np.testing.assert_allclose(_logits(model), _expected(fake_quantized(source, plan)), atol=FLOAT32_MODEL)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", WITH_ACTIVATIONS, ids=_id)
def test_the_graph_computes_the_fake_quantized_model_with_activations(name: str, scheme: Scheme) -> None:
    kind, config = MODELS[name]
    source = random_model(kind, **config)
    plan = make_plan(source, scheme)
    model = portable_model(source)
    apply_plan(model, plan)
    expected = _expected(fake_quantized(source, plan))
    error = np.linalg.norm(_logits(model) - expected) / np.linalg.norm(expected)
    assert error < QUANTIZED_MODEL


def test_smoothing_alone_changes_nothing() -> None:
    source = random_model("qwen2_moe")
    plan = dataclasses.replace(make_plan(source, Scheme("int8", smooth=True)), sites={})
    model = portable_model(source)
    apply_plan(model, plan)
    np.testing.assert_allclose(_logits(model), _expected(source), atol=FLOAT32_MODEL)


def test_every_quantized_matrix_gives_its_codes_back() -> None:
    source = random_model("qwen2_moe")
    model = portable_model(source)
    plan = make_plan(source, Scheme("int4", 16))
    apply_plan(model, plan)
    sites = find_sites(model)
    for name, site in sites.linear.items():
        found = as_quantized(weights.transpose(site.weight, (1, 0)))
        assert (found is None) == (site.role in KEPT_BY_DEFAULT)
        if found is not None:
            np.testing.assert_array_equal(found.scales.numpy(), plan.tensors[f"{name}.weight_scales"].numpy())
    for site_of_experts in sites.experts.values():
        for value in site_of_experts.node.inputs[2:4]:
            assert value is not None and value.const_value is not None
            assert as_quantized(value.const_value) is not None


def test_one_pair_serves_all_quantized_readers_and_no_others() -> None:
    source = random_model("qwen2_moe", num_hidden_layers=1)
    model = portable_model(source)
    plan = make_plan(source, Scheme("int8", activation="int8"))
    apply_plan(model, plan)
    pairs = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    readers = [sorted(str(use.name) for use, _ in node.outputs[0].uses()) for node in pairs]
    scope = "model.layers.0."
    assert readers == [
        [f"{scope}self_attn.{kind}_proj.product" for kind in "kqv"],
        [f"{scope}self_attn.o_proj"],
        [f"{scope}mlp.shared_expert.gate_up_proj"],
        [f"{scope}mlp.shared_expert.down_proj"],
    ]


def test_scales_of_a_16_bit_model_are_rounded_to_its_dtype() -> None:
    source = random_model("qwen2", rounded_to="float16", num_hidden_layers=1)
    model = portable_model(source, dtype=ir.DataType.FLOAT16)
    apply_plan(model, make_plan(source, Scheme("int8", activation="int8")))
    site = find_sites(model).linear["model.layers.0.self_attn.q_proj"]
    assert site.weight.dtype == ir.DataType.FLOAT16
    found = as_quantized(weights.transpose(site.weight, (1, 0)))
    assert found is not None
    scales = found.scales.numpy()
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
    pair = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    assert pair.inputs[1] is not None and pair.inputs[1].dtype == ir.DataType.FLOAT16


def test_codes_chosen_by_the_calibration_are_taken_as_they_are() -> None:
    source = random_model("qwen2", num_hidden_layers=1)
    plan = make_plan(source, Scheme("int4", 32))
    name = "model.layers.0.self_attn.o_proj"
    codes = np.random.default_rng(0).integers(-8, 8, (64, 64)).astype(np.int8)
    plan = dataclasses.replace(plan, tensors={**plan.tensors, f"{name}.weight_codes": ir.tensor(codes)})
    model = portable_model(source)
    apply_plan(model, plan)
    found = as_quantized(weights.transpose(find_sites(model).linear[name].weight, (1, 0)))
    assert found is not None and found.codes.dtype == ir.DataType.INT4
    np.testing.assert_array_equal(found.codes.numpy().astype(np.int8), codes)


def _without(plan: QuantizationPlan, name: str) -> QuantizationPlan:
    return dataclasses.replace(plan, tensors={k: v for k, v in plan.tensors.items() if k != name})


def _with(plan: QuantizationPlan, name: str, array: np.ndarray[Any, Any]) -> QuantizationPlan:
    return dataclasses.replace(plan, tensors={**plan.tensors, name: ir.tensor(array.astype(np.float32))})


Q = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.0.input_layernorm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda plan: dataclasses.replace(plan, sites={"model.layers.7.mlp.up": SitePlan(weight="int8")}),
            "model.layers.7.mlp.up, which the graph does not have",
        ),
        (lambda plan: _without(plan, f"{Q}.weight_scales"), "has no .*q_proj.weight_scales"),
        (lambda plan: _with(plan, f"{Q}.weight_scales", np.ones((64, 2))), r"\[64, 2\] and the graph wants \[64, 1\]"),
        (lambda plan: _with(plan, f"{Q}.input_scale", np.zeros(())), "not one positive number"),
        (lambda plan: _with(plan, f"{NORM}.smoothing", np.ones(63)), r"\[63\] and the graph wants \[64\]"),
        (lambda plan: _with(plan, f"{NORM}.smoothing", -np.ones(64)), "not a positive number"),
        (lambda plan: dataclasses.replace(plan, smoothed=("model.layers.3.input_layernorm",)), "no model.layers.3"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    source = random_model("qwen2", num_hidden_layers=1)
    plan = make_plan(source, Scheme("int8", activation="int8", smooth=True))
    with pytest.raises(GraphError, match=message):
        apply_plan(portable_model(source), change(plan))


def test_smoothing_is_refused_where_something_else_reads_the_norm() -> None:
    source = random_model("qwen2", num_hidden_layers=1)
    model = portable_model(source)
    norm = next(node for node in model.graph if node.name == NORM)
    extra = ir.node("Relu", [norm.outputs[0]], name="extra")
    model.graph.insert_after(norm, extra)
    plan = make_plan(source, Scheme("int8", smooth=True))
    with pytest.raises(GraphError, match=r"Relu \(node extra\) reads its result"):
        apply_plan(model, plan)


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_graph_has_the_same_sites(name: str) -> None:
    kind, config = MODELS[name]
    source = random_model(kind, **config)
    model = portable_model(source)
    before = find_sites(model)
    apply_plan(model, make_plan(source, Scheme("fp8", activation="fp8", cache="int8")))
    after = find_sites(model)
    for kept, found in ((before.linear, after.linear), (before.experts, after.experts), (before.caches, after.caches)):
        assert {key: site.node.name for key, site in kept.items()} == {
            key: site.node.name for key, site in found.items()
        }
    assert not before.unknown and not after.unknown


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_8_bit_caches_compute_the_fake_quantized_model(name: str, cache: str) -> None:
    """Through the attention plugin's reference, whose FP8 caches NumPy can hold."""
    from qwenforge.graph_passes.lower import lower
    from qwenforge.graph_passes.lower.reference_bodies import expand_target_nodes
    from support.tensorrt_choices import lowering

    kind, config = MODELS[name]
    sizes = {"moe_intermediate_size": 64} if name == "sparse" else {}
    source = random_model(kind, **config, **sizes)
    plan = make_plan(source, Scheme("int8", cache=cache))  # type: ignore[arg-type]
    model = portable_model(source)
    apply_plan(model, plan)
    choice = lowering("plugin")
    final = lower(model, choice.target, choice=choice, capacity=48)
    expand_target_nodes(final)
    expected = _expected(fake_quantized(source, plan))
    error = np.linalg.norm(_logits(final) - expected) / np.linalg.norm(expected)
    assert error < QUANTIZED_MODEL
