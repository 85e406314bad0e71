"""Networks of one QwenForgeAttention node, each variant, built into engines by TensorRT for RTX without a GPU.

The caches are inputs and outputs of the network, as the runtimes have them, those of 8 bits too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from support.attention_cases import DTYPES, Call
from support.attention_nodes import attention_model
from support.plugin_library import plugin_library
from support.plugin_library import why_missing as why_no_library
from support.rtx_standin import standin
from support.rtx_standin import why_missing as why_no_standin

pytestmark = pytest.mark.skipif(
    bool(why_no_standin() or why_no_library()), reason=why_no_standin() or why_no_library() or "-"
)

LINEAR = Call(capacity=256, positions=256)
PAGED = replace(LINEAR, page_size=16)
VARIANTS = {
    "linear": LINEAR,
    "packed": replace(LINEAR, packed=True),
    "normalized": replace(LINEAR, norm=True, heads=14, size=128),
    "int8": replace(LINEAR, cache="int8"),
    "fp8, packed": replace(LINEAR, cache="fp8", packed=True),
    "paged": replace(PAGED, window=100),
    "paged int8, packed and normalized": replace(PAGED, cache="int8", packed=True, norm=True),
}
_PAGES = 40


def _model(call: Call, dtype: str, *, in_their_places: bool = False) -> onnx.ModelProto:
    """With a batch and sequence of any size, over linear caches of as many rows, or over so many pages."""
    static: dict[str, int] = {"positions": call.positions, "capacity": call.page_size or call.capacity}
    if call.page_size:
        static |= {"cache_rows": _PAGES, "row_pages": call.row_pages}
    return attention_model(call, dtype, static=static, in_their_places=in_their_places)


def _build(model: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    """What the stand-in's build.py reports."""
    path = folder / "attention.onnx"
    onnx.save(model, path)
    script = Path(__file__).parent.parent / "support" / "rtx_standin" / "build.py"
    options = ["--plugins", str(plugin_library()), "--max-sequence", "64"]
    finished = standin().run(script, path, *options, timeout=240)
    assert finished.stdout, f"the build crashed with exit code {finished.returncode}: {finished.stderr}"
    report: dict[str, Any] = json.loads(finished.stdout)
    return report


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_built(name: str, dtype: str, tmp_path: Path) -> None:
    call = VARIANTS[name]
    report = _build(_model(call, dtype), tmp_path)
    assert report.get("built"), report["errors"]
    element = {"float16": "HALF", "bfloat16": "BF16"}[dtype]
    cache = element if call.cache == "float" else "INT8"
    assert report["outputs"] == {"output": element, "present_key": cache, "present_value": cache}
    assert report["kinds"] == {"PLUGIN_V3": 1}


def _retyped(name: str, element: int) -> Callable[[onnx.ModelProto], None]:
    def fault(model: onnx.ModelProto) -> None:
        (info,) = (info for info in model.graph.input if info.name == name)
        info.type.tensor_type.elem_type = element

    return fault


def _attribute(name: str, value: int) -> Callable[[onnx.ModelProto], None]:
    def fault(model: onnx.ModelProto) -> None:
        (attribute,) = (item for item in model.graph.node[0].attribute if item.name == name)
        attribute.i = value

    return fault


@pytest.mark.parametrize(
    ("name", "fault", "error"),
    [
        ("int8", _retyped("past_key", TensorProto.FLOAT16), "past_key is of type float16, not int8"),
        ("linear", _retyped("past_value", TensorProto.INT8), "past_value is of type int8, but query of type float16"),
        ("int8", _retyped("key_scales", TensorProto.FLOAT16), "key_scales is of type float16, not float32"),
        ("linear", _attribute("packed_qkv", 1), "9 inputs were given, not 7"),
        ("linear", _attribute("cache_type", 2), "9 inputs were given, not 11"),
        ("paged", _attribute("page_size", 24), "page_size is no power of two from 16 on"),
        ("normalized", _attribute("head_size", 64), "dimension 2 of query is 1792, but"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_planted_fault_is_refused_with_its_reason(
    name: str, fault: Callable[[onnx.ModelProto], None], error: str, tmp_path: Path
) -> None:
    model = _model(VARIANTS[name], "float16")
    fault(model)
    _check_refused(model, error, tmp_path)


def test_node_in_onnx_runtimes_form_is_refused(tmp_path: Path) -> None:
    """TensorRT's parser passes names that are empty on as inputs: its nodes list only those that are there."""
    model = _model(VARIANTS["packed"], "float16", in_their_places=True)
    _check_refused(model, "9 inputs were given, not 7", tmp_path)


def _check_refused(model: onnx.ModelProto, error: str, folder: Path) -> None:
    report = _build(model, folder)
    assert not report.get("built")
    assert any(error in line for line in report["errors"]), report["errors"]
