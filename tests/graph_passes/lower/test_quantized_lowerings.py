"""Quantized models lowered for GPUs: the same numbers as the portable graph, the packed codes, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.errors import UnsupportedError
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.lower.reference_bodies import expand_target_nodes
from qwenforge.graph_passes.quantize.apply import apply_plan
from qwenforge.graph_passes.quantize.plan import QuantizationPlan
from qwenforge.ort_cuda_choice import choose
from qwenforge.plugins.moe.packing import pack_int4_values, pack_int8_values
from support.cached_decoder import CachedDecoder, random_tokens
from support.checkpoints import Kind
from support.portable_models import portable_model, random_model
from support.quantized_reference import Scheme, make_plan
from support.tensorrt_choices import lowering
from support.tolerances import FLOAT32_REORDERED

CAPACITY = 32
TOKENS = random_tokens(24, seed=5)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
# A shared expert of two and a half routed ones.
EXPERTS = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 320}
MODELS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "dense": ("qwen2", SIZES | {"num_hidden_layers": 1}),
    "sparse": ("qwen2_moe", SIZES | EXPERTS | {"num_hidden_layers": 1}),
}
SCHEMES = {
    "int8": Scheme("int8"),
    "int4": Scheme("int4", 64),
    "int4, groups of 128": Scheme("int4", 128),
    "int8 w8a8": Scheme("int8", activation="int8"),
    "fp8": Scheme("fp8", activation="fp8"),
    "int8 cache": Scheme("int8", cache="int8"),
}


@functools.cache
def _source(name: str) -> Any:
    kind, config = MODELS[name]
    return random_model(kind, **config)


@functools.cache
def _plan(name: str, scheme: str) -> QuantizationPlan:
    return make_plan(_source(name), SCHEMES[scheme])


def _quantized(name: str, plan: QuantizationPlan) -> ir.Model:
    model = portable_model(_source(name))
    apply_plan(model, plan)
    return model


def _lowered(model: ir.Model, how: str) -> ir.Model:
    if how == "portable":
        return lower(model, "portable")
    if how.startswith("ort-cuda"):
        part = "native" if how.endswith("native") else "plugin"
        choice = choose(device="h200", attention=part, experts=part)
        return lower(model, "ort-cuda", choice=choice, capacity=CAPACITY)
    tensorrt = lowering(how)
    return lower(model, tensorrt.target, choice=tensorrt, capacity=CAPACITY)


def _logits(model: ir.Model) -> np.ndarray[Any, Any]:
    return CachedDecoder(model, capacity=CAPACITY).step([TOKENS])[0]


HOW = ("portable", "plugin", "rtx", "opset 20", "ort-cuda")
REFUSED = (("int8 cache", "rtx"), ("fp8", "opset 20"), ("fp8", "ort-cuda"), ("int8 w8a8", "ort-cuda"))


@pytest.mark.parametrize(("scheme", "how"), sorted(set(itertools.product(SCHEMES, HOW)) - set(REFUSED)))
@pytest.mark.parametrize("name", MODELS)
def test_lowered_graph_answers_as_the_portable_one(name: str, scheme: str, how: str) -> None:
    plan = _plan(name, scheme)
    expected = _logits(_quantized(name, plan))
    final = _lowered(_quantized(name, plan), how)
    expand_target_nodes(final)
    error = np.linalg.norm(_logits(final) - expected) / np.linalg.norm(expected)
    assert error < FLOAT32_REORDERED


@pytest.mark.parametrize(("scheme", "columns"), [("int8", 1), ("int4", 2)])
def test_packed_experts_are_the_codes_that_packing_packs(scheme: str, columns: int) -> None:
    """The codes are rounded here once more, in numpy, rows interleaved by hand, the shared expert cut by hand."""
    source, plan = _source("sparse"), _plan("sparse", scheme)
    final = _lowered(_quantized("sparse", plan), "plugin")
    node = next(node for node in final.graph if node.op_type == "QwenForgeMoE")
    assert node.attributes["num_shared_experts"].as_int() == 3
    mlp, width, group = source.model.layers[0].mlp, 128, SCHEMES[scheme].group_size or 65536
    limits = (-127, 127) if scheme == "int8" else (-8, 7)
    pack = pack_int8_values if scheme == "int8" else pack_int4_values

    def codes(matrix: Any, scales: Any) -> np.ndarray[Any, Any]:
        spread = np.repeat(scales, group, -1)[:, : matrix.shape[1]] if scales.shape[1] > 1 else scales
        return np.clip(np.rint(matrix / spread), *limits).astype(np.int8)

    numbers = {name: tensor.numpy() for name, tensor in plan.tensors.items()}
    scope = "model.layers.0.mlp"
    gate_up, down = (mlp.experts.gate_up_proj.detach().numpy(), mlp.experts.down_proj.detach().numpy())
    first = [codes(gate_up[e], numbers[f"{scope}.experts.gate_up_scales"][e]) for e in range(len(down))]
    second = [codes(down[e], numbers[f"{scope}.experts.down_scales"][e]) for e in range(len(down))]
    shared = mlp.shared_expert
    both = np.concatenate([shared.gate_proj.weight.detach().numpy(), shared.up_proj.weight.detach().numpy()])
    both = codes(both, numbers[f"{scope}.shared_expert.gate_up_proj.weight_scales"])
    last = codes(shared.down_proj.weight.detach().numpy(), numbers[f"{scope}.shared_expert.down_proj.weight_scales"])
    gate, up = np.split(np.pad(both.reshape(2, 320, 128), ((0, 0), (0, 64), (0, 0))).reshape(2 * 384, 128), 2)
    last = np.pad(last, ((0, 0), (0, 64)))
    for start in range(0, 384, width):
        first.append(np.concatenate([gate[start : start + width], up[start : start + width]]))
        second.append(last[:, start : start + width])
    rows = [matrix.reshape(2, -1, 8, 128).swapaxes(0, 1).reshape(2 * width, 128) for matrix in first]
    for index, expected in (
        (2, np.stack([pack(each) for each in rows])),
        (3, np.stack([pack(each) for each in second])),
    ):
        value = node.inputs[index]
        assert value is not None and value.const_value is not None
        assert value.const_value.shape.numpy()[2] == 128 // columns
        np.testing.assert_array_equal(value.const_value.numpy(), expected)


def test_shared_expert_quantized_otherwise_stays_beside_the_plugin() -> None:
    plan = _plan("sparse", "int8 w8a8")
    final = _lowered(_quantized("sparse", plan), "plugin")
    node = next(node for node in final.graph if node.op_type == "QwenForgeMoE")
    assert node.attributes["num_shared_experts"].as_int() == 0
    assert node.attributes["weight_type"].as_int() == 1
    # Six matrices (q, k, v, o and the shared expert's two), and four values: of q, k and v, of o, and of those two.
    assert sum(item.op_type == "DequantizeLinear" for item in final.graph) == 6 + 4


def test_weights_and_scales_are_stored_once_for_each_matrix() -> None:
    final = _lowered(_quantized("dense", _plan("dense", "int4")), "rtx")
    nodes = [node for node in final.graph if node.op_type == "DequantizeLinear"]
    assert len(nodes) == 6
    for node in nodes:
        codes, scales = node.inputs[:2]
        assert codes is not None and codes.dtype == ir.DataType.INT4
        assert scales is not None and codes.shape is not None and scales.shape is not None
        assert list(scales.shape) == [int(codes.shape[0]) // 64, codes.shape[1]]
        assert node.attributes["block_size"].as_int() == 64 and node.attributes["axis"].as_int() == 0


@pytest.mark.parametrize(
    ("name", "scheme", "how", "message"),
    [
        ("dense", Scheme("int4", 32), "rtx", "blocks are of 64 or 128"),
        ("dense", Scheme("uint4", 32), "rtx", "32 of 128 columns, with zero points.*use --target ort-cpu or ort-cuda"),
        ("dense", Scheme("int8", 32), "rtx", "32 of 128 columns, and.*use --target ort-cpu or ort-cuda"),
        ("dense", Scheme("fp8", activation="fp8"), "opset 20", "no FP8 arithmetic"),
        ("dense", Scheme("fp8"), "ort-cuda", "is FP8"),
        ("dense", Scheme("int8", cache="int8"), "ort-cuda, native", "use --attention plugin"),
        ("sparse", Scheme("int8"), "ort-cuda, native", "use --experts plugin"),
        ("dense", Scheme("int8", activation="int8"), "ort-cuda", "no quantized activations"),
        ("dense", Scheme("int8", cache="int8"), "rtx", "use --attention plugin"),
        ("sparse", Scheme("int4", 32), "plugin", "groups of 64 and 128"),
        ("sparse", Scheme("int8", 64), "plugin", "one scale a row"),
        ("sparse", Scheme("uint4", 64), "plugin", "zero points"),
        ("sparse", Scheme("fp8"), "plugin", "their tokens are not"),
        ("sparse", Scheme("int8"), "native experts", "use --experts plugin"),
    ],
)
def test_what_the_target_cannot_compute_is_refused_by_name(name: str, scheme: Scheme, how: str, message: str) -> None:
    plan = make_plan(_source(name), scheme)
    with pytest.raises(UnsupportedError, match=message):
        _lowered(_quantized(name, plan), how)


def test_the_fp8_cache_of_the_plugin_is_of_bytes() -> None:
    plan = make_plan(_source("dense"), Scheme("int8", cache="fp8"))
    final = _lowered(_quantized("dense", plan), "plugin")
    caches = [value for value in (*final.graph.inputs, *final.graph.outputs) if ".0." in (value.name or "")]
    assert len(caches) == 4 and {value.dtype for value in caches} == {ir.DataType.INT8}
    node = next(node for node in final.graph if node.op_type == "QwenForgeAttention")
    assert node.attributes["cache_type"].as_int() == 1
    assert [value.name for value in node.inputs[-2:] if value is not None] == [
        "model.layers.0.self_attn.cache.key_scales",
        "model.layers.0.self_attn.cache.value_scales",
    ]


def test_unquantized_sites_keep_their_weights() -> None:
    plan = _plan("dense", "int8")
    kept = dataclasses.replace(plan, sites={k: v for k, v in plan.sites.items() if "down_proj" not in k})
    final = _lowered(_quantized("dense", kept), "rtx")
    assert sum(node.op_type == "DequantizeLinear" for node in final.graph) == 5
