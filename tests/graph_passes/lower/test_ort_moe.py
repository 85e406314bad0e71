"""The expert function as ``com.microsoft::MoE``, against numpy in fp64 over the configurations of the family."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.exporter import weights
from qwenforge.graph_passes.functions import MIXTURE_OF_EXPERTS
from qwenforge.graph_passes.lower.ort_moe import LowerMixtureOfExperts
from support.expert_graphs import ExpertCase, expert_case
from support.small_graphs import Array, answers, apply_rule, ops, relative_error
from support.tolerances import FLOAT16, FLOAT32_EXACT


def _lowered(case: ExpertCase) -> ir.Model:
    model = case.graph()
    assert apply_rule(LowerMixtureOfExperts(), model).matches == 1
    assert ops(model) == ["MoE"]
    return model


def _answer(case: ExpertCase) -> Array:
    return answers(_lowered(case), **case.feeds())[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("experts", [1, 2, 7, 60, 64])
def test_kernel_answers_as_numpy_for_one_to_eight_experts_a_token(
    experts: int, normalize: bool, dtype: type[np.floating]
) -> None:
    bound = FLOAT32_EXACT if dtype is np.float32 else FLOAT16
    for top_k in range(1, min(8, experts) + 1):
        case = expert_case(experts, top_k, normalize=normalize, dtype=dtype)
        assert relative_error(_answer(case), case.expected()) < bound, f"top {top_k}"


@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(1, 16, 8), (33, 17, 9), (4, 130, 70)])
def test_kernel_answers_as_numpy_for_odd_sizes(tokens: int, hidden: int, intermediate: int) -> None:
    case = expert_case(6, 3, tokens=tokens, hidden=hidden, intermediate=intermediate)
    assert relative_error(_answer(case), case.expected()) < FLOAT32_EXACT


def test_large_activations_are_not_clamped() -> None:
    """The kernel's SwiGLU has a limit for other models; ours has none."""
    case = expert_case(6, 2, weight_scale=50.0)
    assert np.abs(case.gate_up @ case.x.T).max() > 100
    assert relative_error(_answer(case), case.expected()) < FLOAT32_EXACT


@pytest.mark.parametrize("scale", [20.0, 200.0])
def test_large_router_logits_are_computed_without_overflow(scale: float) -> None:
    case = expert_case(16, 4, router_scale=scale)
    assert relative_error(_answer(case), case.expected()) < FLOAT32_EXACT


def test_last_of_equal_experts_are_taken() -> None:
    """``TopK`` takes the first, ``torch.topk`` none in particular: on exact ties there is no right answer to match."""
    case = expert_case(6, 2, tokens=1)
    case.router_logits[:] = 0
    reversed_order = replace(case, gate_up=case.gate_up[::-1], down=case.down[::-1])
    assert relative_error(_answer(case), reversed_order.expected()) < FLOAT32_EXACT


def test_weights_are_interleaved_by_their_plan_only() -> None:
    model = _lowered(expert_case(4, 2))
    node = model.graph[0]
    first = node.inputs[2]
    assert first is not None and isinstance(first.const_value, weights.DerivedTensor)
    assert node.name == "model.layers.0.mlp.experts" and node.inputs[3] is None
    assert "experts.gate_up" in {leaf.name for leaf in weights.leaves(first.const_value)}


def _refused(model: ir.Model, reason: str) -> None:
    rule = apply_rule(LowerMixtureOfExperts(), model)
    assert rule.matches == 0 and reason in rule.failures[0]
    assert ops(model) == [MIXTURE_OF_EXPERTS]


def test_experts_that_are_not_initializers_are_left_alone() -> None:
    model = expert_case(4, 2).graph()
    weight = model.graph.initializers.pop("experts.down")
    weight.const_value = None
    model.graph.inputs.append(weight)
    _refused(model, "not initializers")


def test_router_of_another_dtype_is_left_alone() -> None:
    case = expert_case(4, 2, dtype=np.float16)
    mixed = replace(case, router_logits=case.router_logits.astype(np.float32))
    model = mixed.graph()
    _refused(model, "another dtype")
    assert relative_error(answers(model, **mixed.feeds())[0], mixed.expected()) < FLOAT16
