"""A verification accepts what is equal, in either form, and catches each of a set of wrong rewrites."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.errors import VerificationError
from qwenforge.graph_passes import execution
from qwenforge.graph_passes.verify import FLOAT32_BOUND, Verifier, inexpressible_scenarios, verify_rewrite
from support.foreign_graphs import ForeignGraph, foreign_model
from support.tolerances import FLOAT32_REORDERED
from support.toy_attention import toy_attention


def _node(model: ir.Model, output: str) -> ir.Node:
    return next(node for node in model.graph if any(value.name == output for value in node.outputs))


def _value(model: ir.Model, name: str) -> ir.Value:
    return next(value for node in model.graph for value in node.outputs if value.name == name)


def _scale(model: ir.Model, name: str, factor: float) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)


def _constant(model: ir.Model, output: str, name: str, value: float) -> None:
    _node(model, output).attributes[name] = ir.AttrFloat32(name, value)


def _drop_key_rotation(model: ir.Model) -> None:
    _value(model, "k").replace_all_uses_with(_value(model, "k_heads"))


def _rotate_interleaved(model: ir.Model) -> None:
    for name in ("q", "k"):
        _node(model, name).attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def _ignore_mask(model: ir.Model) -> None:
    _constant(model, "far", "value_float", 0.0)


def _weaken_mask(model: ir.Model) -> None:
    _constant(model, "far", "value_float", -8.0)


def _swap_heads(model: ir.Model) -> None:
    node = _node(model, "y_split")
    swapped = ir.node("Gather", [node.inputs[0], _swap_index(model)], {"axis": 1})
    model.graph.insert_before(node, swapped)
    node.replace_input_with(0, swapped.outputs[0])


def _swap_index(model: ir.Model) -> ir.Value:
    value = ir.Value(name="swap", const_value=ir.tensor(np.array([1, 0]), name="swap"))
    model.graph.register_initializer(value)
    return value


def _cache_unrotated_key(model: ir.Model) -> None:
    _node(model, "present.0.key").replace_input_with(1, _value(model, "k_heads"))


def _swap_key_and_value_caches(model: ir.Model) -> None:
    key, value = _node(model, "present.0.key"), _node(model, "present.0.value")
    first, second = key.inputs[0], value.inputs[0]
    key.replace_input_with(0, second)
    value.replace_input_with(0, first)


BUGS: dict[str, Callable[[ir.Model], None]] = {
    "value projection one percent off": lambda model: _scale(model, "wv", 1.01),
    "logits one permille off": lambda model: _scale(model, "head", 1.001),
    "key not rotated": _drop_key_rotation,
    "interleaved rotation": _rotate_interleaved,
    "mask ignored": _ignore_mask,
    "mask too weak": _weaken_mask,
    "heads swapped": _swap_heads,
    "unrotated key in the cache": _cache_unrotated_key,
    "caches swapped": _swap_key_and_value_caches,
}


@pytest.mark.parametrize("before", ["growing", "in_place"])
@pytest.mark.parametrize("after", ["growing", "in_place"])
def test_both_forms_of_a_model_are_equal(before: str, after: str) -> None:
    outcome = verify_rewrite(toy_attention(before), toy_attention(after))  # type: ignore[arg-type]
    assert outcome.ok, outcome.summary()
    assert outcome.error is not None and outcome.error < FLOAT32_REORDERED
    assert len(outcome.checks) == 4 * 3, "four scenarios of logits, keys and values"
    assert not outcome.skipped


@pytest.mark.parametrize("after", ["growing", "in_place"])
@pytest.mark.parametrize("bug", BUGS)
def test_wrong_rewrite_is_caught(bug: str, after: str) -> None:
    wrong = toy_attention(after)  # type: ignore[arg-type]
    BUGS[bug](wrong)
    outcome = verify_rewrite(toy_attention("growing"), wrong)
    assert not outcome.ok
    assert outcome.error is None or outcome.error > FLOAT32_BOUND


def test_positions_off_by_one_in_decode_only_are_caught_there() -> None:
    """A rewrite that takes cache_position for the position is right for prefill and wrong for a shifted decode."""
    wrong = toy_attention("in_place")
    one = ir.Value(name="one_more", const_value=ir.tensor(np.array(1), name="one_more"))
    wrong.graph.register_initializer(one)
    positions = next(value for value in wrong.graph.inputs if value.name == "position_ids")
    cache_position = next(value for value in wrong.graph.inputs if value.name == "cache_position")
    axis = ir.Value(name="axis", const_value=ir.tensor(np.array([1]), name="axis"))
    wrong.graph.register_initializer(axis)
    started = ir.node("Min", [cache_position, one])
    column = ir.node("Unsqueeze", [started.outputs[0], axis])
    shifted = ir.node("Add", [positions, column.outputs[0]])
    for node in (_node(wrong, "q"), _node(wrong, "k")):
        node.replace_input_with(3, shifted.outputs[0])
    wrong.graph.insert_before(_node(wrong, "x"), [started, column, shifted])
    outcome = verify_rewrite(toy_attention("growing"), wrong)
    bad = {check.scenario for check in outcome.checks if not check.ok}
    assert bad == {"decode against a part-filled cache", "several tokens against a part-filled cache"}


def test_bound_is_adjustable_and_reported() -> None:
    slightly = toy_attention("growing")
    _scale(slightly, "head", 1.001)
    assert verify_rewrite(toy_attention("growing"), slightly, tolerance=1e-2).ok
    outcome = verify_rewrite(toy_attention("growing"), slightly, tolerance=1e-4)
    assert "logits moves by 1.0e-03" in outcome.summary() and "beyond the bound of 1e-04" in outcome.summary()


def test_rewrite_that_does_not_load_fails_with_the_reason() -> None:
    broken = toy_attention("growing")
    _node(broken, "logits").op_type = "NoSuchOperator"
    outcome = verify_rewrite(toy_attention("growing"), broken)
    assert not outcome.ok and "NoSuchOperator" in outcome.summary()


def test_rewrite_that_answers_nan_is_refused() -> None:
    wrong = toy_attention("growing")
    _scale(wrong, "head", float("nan"))
    outcome = verify_rewrite(toy_attention("growing"), wrong)
    assert not outcome.ok and outcome.error == float("inf")


def test_reference_is_run_once_and_models_are_left_alone() -> None:
    before, after = toy_attention("growing"), toy_attention("in_place")
    text = str(after.graph)
    verifier = Verifier(before)
    before.graph.initializers.clear()  # the verifier needs the model no more
    assert verifier.check(after).ok and verifier.check(toy_attention("growing")).ok
    assert str(after.graph) == text


def test_shared_weights_give_the_same_answers_as_inline_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights reach the session without a copy; here all of them are treated as large, from memory and file."""
    verifier = Verifier(toy_attention("growing"))
    ir.save(toy_attention("in_place"), tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=0)
    assert verifier.check(ir.load(tmp_path / "model.onnx")).ok
    monkeypatch.setattr(execution, "_INLINE_BYTES", 0)
    for model in (toy_attention("growing"), ir.load(tmp_path / "model.onnx")):
        outcome = verifier.check(model)
        assert outcome.ok, outcome.summary()


def test_seed_decides_the_numbers() -> None:
    wrong = toy_attention("growing")
    _drop_key_rotation(wrong)
    first, again, other = (verify_rewrite(toy_attention("growing"), wrong, seed=seed).error for seed in (0, 0, 1))
    assert first == again != other


def test_graph_of_static_sizes_gets_the_scenarios_it_can_express() -> None:
    model = foreign_model(ForeignGraph(exporter="dynamo_flat", static=True))
    verifier = Verifier(model)
    reasons = {each.scenario: each.reason for each in verifier.skipped}
    assert "never an empty one" in reasons["prefill"]
    assert "3 tokens at a time" in reasons["decode against a part-filled cache"]
    outcome = verifier.check(model)
    assert outcome.ok
    assert {check.scenario for check in outcome.checks} == {"several tokens against a part-filled cache"}


def test_prefill_graph_reports_the_decodes_it_cannot_run() -> None:
    model = foreign_model(ForeignGraph(exporter="dynamo_prefill"))
    assert [each.reason for each in inexpressible_scenarios(model)] == ["the graph takes no cache"] * 2
    assert verify_rewrite(model, model).ok


def test_graph_without_mask_reports_that_unequal_caches_are_not_covered() -> None:
    model = foreign_model(ForeignGraph(masked=False))
    assert all("no attention mask" in each.reason for each in inexpressible_scenarios(model))
    assert len(inexpressible_scenarios(model)) == 2


def test_model_that_runs_no_scenario_is_an_error() -> None:
    model = toy_attention("growing")
    _scale(model, "head", float("nan"))
    with pytest.raises(VerificationError, match="infinities or NaN"):
        Verifier(model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_model_is_verified_as_a_function_in_float32(dtype: str) -> None:
    graph = ForeignGraph(attention="sdpa", opset=23, dtype=dtype)  # type: ignore[arg-type]
    model = foreign_model(graph)
    verifier = Verifier(model)
    outcome = verifier.check(model)
    assert outcome.ok and outcome.error == 0
    assert {check.precision for check in outcome.checks} == ({"fp32", "fp16"} if dtype == "float16" else {"fp32"})
    assert model.graph.inputs[3].dtype == ir.DataType[dtype.upper()], "the model itself keeps its type"
    weight = next(v for v in model.graph.initializers.values() if "norm" in str(v.name))
    assert weight.const_value is not None
    weight.const_value = ir.tensor((weight.const_value.numpy() * 1.01).astype(weight.const_value.numpy().dtype))
    assert not verifier.check(model).ok


def test_tiny_model_is_verified_in_a_second() -> None:
    model = foreign_model(ForeignGraph(kind="moe", attention="sdpa"))
    verifier = Verifier(model)
    start = time.perf_counter()
    assert verifier.check(model).ok
    assert time.perf_counter() - start < 1.0
