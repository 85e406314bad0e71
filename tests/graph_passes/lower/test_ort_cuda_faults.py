"""Wrong ort-cuda lowerings, planted one at a time: the comparison with the portable form has to refuse each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import ort_cuda_choice
from qwenforge.exporter import weights
from qwenforge.graph_passes.lower import expert_packing, lower, qkv_packing
from qwenforge.graph_passes.verify import verify_rewrite
from support.portable_models import portable_model, random_model

Fault = Callable[[ir.Model], None]
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "window": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen2_moe": ("qwen2_moe", {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}),
}
_MODELS: dict[str, ir.Model] = {}


def _portable(name: str) -> ir.Model:
    if name not in _MODELS:
        kind, config = _CONFIGS[name]
        model = random_model(kind, seed=3, **config)  # type: ignore[arg-type]
        _spread_norms(model)
        _MODELS[name] = portable_model(model)
    return _MODELS[name].clone()


def _spread_norms(model: Any) -> None:
    """Weights of norms that are not all alike: a norm that is left out, or exchanged, shows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))


def _lowered(name: str, attention: str = "plugin") -> ir.Model:
    choice = ort_cuda_choice.choose(attention=attention)  # type: ignore[arg-type]
    return lower(_portable(name), "ort-cuda", choice=choice)


def _nodes(model: ir.Model, op: str) -> list[ir.Node]:
    found = [node for node in model.graph if node.op_type == op]
    assert found
    return found


def _attribute(op: str, **changes: int | float) -> Fault:
    def fault(model: ir.Model) -> None:
        node = _nodes(model, op)[0]
        for name, value in changes.items():
            assert name in node.attributes
            node.attributes[name] = ir.convenience.convert_attribute(name, value)

    return fault


def _swap_inputs(op: str, first: int, second: int) -> Fault:
    def fault(model: ir.Model) -> None:
        node = _nodes(model, op)[0]
        one, other = node.inputs[first], node.inputs[second]
        assert one is not None and other is not None
        node.replace_input_with(first, other)
        node.replace_input_with(second, one)

    return fault


def _norm_dropped(model: ir.Model) -> None:
    """The op is told of no norm, and given none."""
    node = _nodes(model, "QwenForgeAttention")[0]
    node.attributes["qk_norm"] = ir.AttrInt64("qk_norm", 0)
    node.resize_inputs(9)


def _other_tables(model: ir.Model) -> None:
    """Rotary tables of another base."""
    for function, name in ((np.cos, "cos"), (np.sin, "sin")):
        (found,) = [value for key, value in model.graph.initializers.items() if name in key]
        assert found.const_value is not None
        positions, half = found.const_value.numpy().shape
        angles = np.arange(positions)[:, None] * 100.0 ** -(np.arange(half) / half)
        found.const_value = ir.tensor(function(angles).astype(np.float32), name=found.name)


def _one_norm_for_both(model: ir.Model) -> None:
    """The heads of k are normalized by q's weight."""
    node = _nodes(model, "QwenForgeAttention")[0]
    node.replace_input_with(10, node.inputs[9])


def _always_at_the_start(model: ir.Model) -> None:
    """cache_position is 0: right for prompts, wrong for what follows them."""
    node = _nodes(model, "QwenForgeAttention")[0]
    zeros = ir.node("Sub", [node.inputs[8], node.inputs[8]], name="zeros")
    zeros.outputs[0].name, zeros.outputs[0].type = "zeros", ir.TensorType(ir.DataType.INT32)
    model.graph.insert_before(node, zeros)
    node.replace_input_with(8, zeros.outputs[0])


def _lengths_one_short(model: ir.Model) -> None:
    """seqlens_k of GroupQueryAttention is the number of keys less one; here it is one less than that."""
    last = next(node for node in model.graph if node.name == "attention.last_key")
    again = ir.node("Sub", [last.outputs[0], last.inputs[1]], name="attention.shorter")
    again.outputs[0].name, again.outputs[0].type = "shorter", last.outputs[0].type
    model.graph.insert_after(last, again)
    for node in _nodes(model, "GroupQueryAttention"):
        node.replace_input_with(5, again.outputs[0])


@pytest.mark.parametrize(
    ("name", "attention", "fault"),
    [
        ("qwen2", "plugin", _attribute("QwenForgeAttention", scale=0.3)),
        ("qwen2", "plugin", _attribute("QwenForgeAttention", sliding_window=3)),
        ("window", "plugin", _attribute("QwenForgeAttention", sliding_window=0)),
        ("window", "plugin", _attribute("QwenForgeAttention", sliding_window=4)),
        ("qwen2", "plugin", _swap_inputs("QwenForgeAttention", 5, 6)),
        ("qwen2", "plugin", _swap_inputs("QwenForgeAttention", 3, 4)),
        ("qwen2", "plugin", _other_tables),
        ("qwen2", "plugin", _always_at_the_start),
        ("qwen3", "plugin", _norm_dropped),
        ("qwen3", "plugin", _one_norm_for_both),
        ("qwen3", "plugin", _swap_inputs("QwenForgeAttention", 9, 10)),
        ("qwen3", "plugin", _attribute("QwenForgeAttention", epsilon=0.5)),
        ("qwen2", "native", _attribute("GroupQueryAttention", scale=0.3)),
        ("window", "native", _attribute("GroupQueryAttention", local_window_size=-1)),
        ("qwen2", "native", _attribute("GroupQueryAttention", rotary_interleaved=1)),
        ("qwen2", "native", _swap_inputs("GroupQueryAttention", 3, 4)),
        ("qwen2", "native", _swap_inputs("GroupQueryAttention", 7, 8)),
        ("qwen2", "native", _lengths_one_short),
        ("qwen2_moe", "native", _attribute("QwenForgeMoE", top_k=1)),
        ("qwen2_moe", "native", _attribute("QwenForgeMoE", normalize_topk=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__qualname__.removesuffix(".<locals>.fault"),
)
def test_wrong_node_is_refused(name: str, attention: str, fault: Fault) -> None:
    good = _lowered(name, attention)
    assert verify_rewrite(_portable(name), good).ok
    if fault.__qualname__.startswith("_attribute"):
        _require_interleaving_is_spelled(good)
    fault(good)
    assert not verify_rewrite(_portable(name), good).ok


def _require_interleaving_is_spelled(model: ir.Model) -> None:
    """GroupQueryAttention's default, written out so that a fault can change it."""
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes.setdefault("rotary_interleaved", ir.AttrInt64("rotary_interleaved", 0))


def _keys_first(tensors: Sequence[ir.TensorProtocol], axis: int) -> ir.TensorProtocol:
    """[Wk | Wq | Wv] where [Wq | Wk | Wv] is expected."""
    first, second, *rest = tensors
    return weights.concat([second, first, *rest], axis)


def _values_before_keys(tensors: Sequence[ir.TensorProtocol], axis: int) -> ir.TensorProtocol:
    first, second, third = tensors
    return weights.concat([first, third, second], axis)


@pytest.mark.parametrize("attention", ["native", "plugin"])
@pytest.mark.parametrize("order", [_keys_first, _values_before_keys])
def test_projections_packed_in_another_order_are_refused(order: Any, attention: str) -> None:
    with mock.patch.object(qkv_packing, "weights", mock.Mock(concat=order)):
        wrong = _lowered("qwen2", attention)
    assert not verify_rewrite(_portable("qwen2"), wrong).ok


@pytest.mark.parametrize(
    "patch",
    [
        mock.patch.object(expert_packing, "ROWS", 4),
        mock.patch.object(expert_packing.weights, "interleave_rows", lambda tensor, rows: tensor),
    ],
    ids=["groups of 4 rows", "gate behind up"],
)
def test_wrong_packing_of_experts_is_refused(patch: mock._patch[object]) -> None:
    with patch:
        wrong = _lowered("qwen2_moe")
        assert not verify_rewrite(_portable("qwen2_moe"), wrong).ok


@pytest.mark.parametrize(
    "fault",
    [
        _attribute("QwenForgeAttention", cache_type=1),
        _attribute("QwenForgeAttention", page_size=16),
        _attribute("QwenForgeAttention", packed_qkv=0),
        _attribute("QwenForgeAttention", qk_norm=1),
        _attribute("QwenForgeAttention", num_key_value_heads=3),
        _attribute("QwenForgeMoE", layout_version=2),
        _attribute("QwenForgeMoE", weight_type=1),
    ],
    ids=["8-bit cache", "paged cache", "packed without saying so", "norm without weights", "heads", "layout", "int8"],
)
def test_node_beyond_its_reference_is_refused_and_not_guessed(fault: Fault) -> None:
    model = _lowered("qwen2_moe")
    fault(model)
    outcome = verify_rewrite(_portable("qwen2_moe"), model)
    assert not outcome.ok and "its reference does not model" in outcome.summary()
