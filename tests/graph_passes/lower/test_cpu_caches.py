"""Key/value caches in fp16: all of a graph's, or none."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.lower.cpu_caches import HalfCaches
from qwenforge.graph_passes.lower.cpu_ops import ATTENTION
from support.portable_models import portable_model, random_model


def _caches(model: ir.Model) -> list[ir.Value]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return [value for value in values if str(value.name).startswith(("past_key_values.", "present."))]


def _lowered(*, half_caches: bool = False) -> ir.Model:
    return lower(portable_model(random_model("qwen2")), "ort-cpu", own_ops=True, half_caches=half_caches)


def test_every_cache_is_fp16_and_a_copy_made_before_stays() -> None:
    portable = portable_model(random_model("qwen2"))
    copy = portable.clone()
    lowered = lower(portable, "ort-cpu", own_ops=True, half_caches=True)
    layers = sum(node.op_type == ATTENTION for node in lowered.graph)
    caches = _caches(lowered)
    assert layers >= 2 and len(caches) == 4 * layers
    assert {value.dtype for value in caches} == {ir.DataType.FLOAT16}
    assert {value.dtype for value in _caches(copy)} == {ir.DataType.FLOAT}


def test_without_being_asked_for_caches_stay() -> None:
    assert {value.dtype for value in _caches(_lowered())} == {ir.DataType.FLOAT}


@pytest.mark.parametrize("spoil", ["another attention", "another reader of a past", "another reader of a present"])
def test_no_cache_changes_where_something_else_has_one(spoil: str) -> None:
    model = _lowered()
    attention = [node for node in model.graph if node.op_type == ATTENTION][-1]
    if spoil == "another attention":
        attention.op_type, attention.domain = "GroupQueryAttention", "com.microsoft"
    else:
        read = attention.inputs[3] if spoil == "another reader of a past" else attention.outputs[2]
        assert read is not None
        model.graph.append(ir.node("Identity", [read]))
    rule = HalfCaches()
    rule(model)
    assert rule.matches == 0 and len(rule.failures) == 1
    assert {value.dtype for value in _caches(model)} == {ir.DataType.FLOAT}
