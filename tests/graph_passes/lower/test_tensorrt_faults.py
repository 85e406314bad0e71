"""Wrong lowerings, planted one at a time: the comparison with the portable form has to refuse each of them."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.graph_passes.lower import expert_packing, lower, tensorrt_moe
from qwenforge.graph_passes.verify import verify_rewrite
from support.portable_models import portable_model, random_model
from support.tensorrt_choices import lowering

Fault = Callable[[ir.Model], None]
_MODELS: dict[str, ir.Model] = {}


def _portable(kind: str) -> ir.Model:
    if kind not in _MODELS:
        config = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40} if kind == "qwen2_moe" else {}
        _MODELS[kind] = portable_model(random_model(kind, seed=3, **config))  # type: ignore[arg-type]
    return _MODELS[kind].clone()


def _lowered(kind: str, how: str) -> ir.Model:
    return lower(_portable(kind), lowering(how).target, choice=lowering(how))


def _nodes(model: ir.Model, op: str) -> list[ir.Node]:
    found = [node for node in model.graph if node.op_type == op]
    assert found
    return found


def _attribute(op: str, **changes: int | float | str) -> Fault:
    def fault(model: ir.Model) -> None:
        node = _nodes(model, op)[0]
        for name, value in changes.items():
            node.attributes[name] = ir.convenience.convert_attribute(name, value)

    return fault


def _swap_inputs(op: str, first: int, second: int) -> Fault:
    def fault(model: ir.Model) -> None:
        node = _nodes(model, op)[0]
        one, other = node.inputs[first], node.inputs[second]
        node.replace_input_with(first, other)
        node.replace_input_with(second, one)

    return fault


def _unscaled(model: ir.Model) -> None:
    """q enters the attention layer as it is: the layer has no scale of its own."""
    attention = _nodes(model, "TRT_Attention")[0]
    scaled = attention.inputs[0]
    assert scaled is not None
    scaling = scaled.producer()
    assert scaling is not None
    attention.replace_input_with(0, scaling.inputs[0])


def _lengths_without_the_new_tokens(model: ir.Model) -> None:
    """kv_lengths = cache_position."""
    end = next(node for node in model.graph if node.name == "attention.valid_keys")
    end.outputs[0].replace_all_uses_with(end.inputs[0])  # type: ignore[arg-type]


def _rotation_left_out(model: ir.Model) -> None:
    rotary = _nodes(model, "RotaryEmbedding")[1]
    rotary.outputs[0].replace_all_uses_with(rotary.inputs[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "how", "fault"),
    [
        ("qwen2", "native", _attribute("TRT_Attention", causal_kind="upper_left")),
        ("qwen2", "native", _attribute("TRT_Attention", causal_kind="none")),
        ("qwen2", "native", _unscaled),
        ("qwen2", "native", _lengths_without_the_new_tokens),
        ("qwen2", "native", _rotation_left_out),
        ("qwen2", "plugin", _attribute("QwenForgeAttention", scale=0.2)),
        ("qwen2", "plugin", _attribute("QwenForgeAttention", sliding_window=3)),
        ("qwen2", "plugin", _swap_inputs("QwenForgeAttention", 5, 6)),
        ("qwen2", "plugin", _swap_inputs("QwenForgeAttention", 3, 4)),
        ("qwen2_moe", "plugin", _attribute("QwenForgeMoE", top_k=1)),
        ("qwen2_moe", "plugin", _attribute("QwenForgeMoE", normalize_topk=1)),
        ("qwen2_moe", "native experts", _swap_inputs("TRT_MoE", 3, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__qualname__.removesuffix(".<locals>.fault"),
)
def test_wrong_node_is_refused(kind: str, how: str, fault: Fault) -> None:
    good = _lowered(kind, how)
    assert verify_rewrite(_portable(kind), good).ok
    fault(good)
    assert not verify_rewrite(_portable(kind), good).ok


def _unfilled_last_slice(
    gate_up: ir.TensorProtocol, down: ir.TensorProtocol, width: int
) -> expert_packing.SharedSlices:
    """The last slice overlaps the one before instead of being filled up with zeros."""
    with mock.patch.object(expert_packing, "_filled", _filled_with_ones):
        return expert_packing.shared_slices(gate_up, down, width)


def _filled_with_ones(tensor: ir.TensorProtocol, axis: int, size: int) -> ir.TensorProtocol:
    have = list(tensor.shape)
    missing = [size - int(length) if index == axis else int(length) for index, length in enumerate(have)]
    if not missing[axis]:
        return tensor
    return expert_packing.weights.concat([tensor, ir.tensor(np.ones(missing, tensor.dtype.numpy()))], axis)


@pytest.mark.parametrize(
    "patch",
    [
        mock.patch.object(expert_packing, "ROWS", 4),
        mock.patch.object(expert_packing.weights, "interleave_rows", lambda tensor, rows: tensor),
        mock.patch.object(tensorrt_moe, "shared_slices", _unfilled_last_slice),
    ],
    ids=["groups of 4 rows", "gate behind up", "last slice not filled with zeros"],
)
def test_wrong_packing_is_refused(patch: mock._patch[object]) -> None:
    with patch:
        wrong = _lowered("qwen2_moe", "plugin")
        assert not verify_rewrite(_portable("qwen2_moe"), wrong).ok


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("plugin", _attribute("QwenForgeMoE", layout_version=2)),
        ("native experts", _attribute("TRT_MoE", activation_type=0)),
        ("native", _attribute("TRT_Attention", causal_kind="sideways")),
    ],
)
def test_node_beyond_its_reference_is_refused_and_not_guessed(how: str, fault: Fault) -> None:
    model = _lowered("qwen2_moe", how)
    fault(model)
    outcome = verify_rewrite(_portable("qwen2_moe"), model)
    assert not outcome.ok and "its reference does not model" in outcome.summary()
