"""Quantized graphs, parsed and built into engines by TensorRT for RTX without a GPU.

A build proves that every Q/DQ node is understood with its types, axes and blocks, and that our plugin takes the packed
experts and 8-bit caches. What the engine computes is :mod:`test_quantized_lowerings`'s, on the same graphs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from support.checkpoints import Kind, make_checkpoint
from support.lowered_files import LoweredFile, Lowerings
from support.plugin_library import plugin_library
from support.plugin_library import why_missing as why_no_library
from support.quantized_reference import Scheme, make_plan
from support.rtx_standin import standin
from support.rtx_standin import why_missing as why_no_standin
from support.summary import TABLES
from support.tensorrt_choices import lowering

pytestmark = pytest.mark.skipif(
    bool(why_no_standin() or why_no_library()), reason=why_no_standin() or why_no_library() or "-"
)

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "dense": ("qwen2", SIZES),
    "MoE": ("qwen2_moe", SIZES | {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}),
}
SCHEMES = {
    "INT8 weights": {"weight": "int8"},
    "INT8 W8A8": {"weight": "int8", "activation": "int8"},
    "FP8": {"weight": "fp8", "activation": "fp8"},
    "INT4 by 64": {"weight": "int4", "group_size": 64},
    "INT4 by 128": {"weight": "int4", "group_size": 128},
    "INT8 cache": {"weight": "int8", "cache": "int8"},
    "FP8 cache": {"weight": "fp8", "activation": "fp8", "cache": "fp8"},
}
DTYPES = {"fp16": (ir.DataType.FLOAT16, "float16"), "bf16": (ir.DataType.BFLOAT16, "bfloat16")}
BLOCKS = {
    "INT4 zero points": {"weight": "uint4", "group_size": 128},
    "INT8 by 64": {"weight": "int8", "group_size": 64},
}
"""Integers that TensorRT has no form for, as INT4 blocks and sums over groups; the plugin's experts have none."""
CASES = [("rtx", scheme, dtype) for scheme in SCHEMES if "cache" not in scheme for dtype in DTYPES]
CASES += [("plugin", scheme, "fp16") for scheme in SCHEMES]
CASES += [("opset 20", scheme, "fp16") for scheme in SCHEMES if "FP8" not in scheme]
_HEAD = f"{'graph':<10}{'lowering':<10}{'type':<6}{'quantized':<18}{'Q':>5}{'DQ':>5}{'plugins':>8}{'engine MB':>11}"


@functools.cache
def _checkpoint(folder: Path, name: str) -> tuple[Path, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    kind, config = MODELS[name]
    path = make_checkpoint(folder / name, kind, dtype="bfloat16", tokenizer=False, **config)
    return path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@functools.cache
def _lowerings(checkpoint: Path, dtype: str) -> Lowerings:
    return Lowerings(checkpoint, DTYPES[dtype][0], 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


def _build(model: LoweredFile) -> dict[str, Any]:
    script = Path(__file__).parent.parent / "support" / "rtx_standin" / "build.py"
    library = ["--plugins", str(plugin_library())] if model.needs_plugins else []
    finished = standin().run(script, model.path, *library, "--max-sequence", "256")
    assert finished.stdout, f"the build crashed with exit code {finished.returncode}: {finished.stderr}"
    report: dict[str, Any] = json.loads(finished.stdout)
    return report


BUILDS = [(name, *case) for name in MODELS for case in CASES]
BUILDS += [("dense", "rtx", scheme, dtype) for scheme in BLOCKS for dtype in DTYPES]
BUILDS += [("dense", "opset 20", scheme, "fp16") for scheme in BLOCKS]


@pytest.mark.parametrize(("name", "how", "scheme", "dtype"), BUILDS)
def test_quantized_model_is_built(name: str, how: str, scheme: str, dtype: str, folder: Path) -> None:
    checkpoint, source = _checkpoint(folder, name)
    settings = (SCHEMES | BLOCKS)[scheme]
    plan = make_plan(source, Scheme(**settings, dtype=DTYPES[dtype][1]))  # type: ignore[arg-type]
    place = folder / f"{name}-{how}-{scheme}-{dtype}".replace(" ", "-")
    model = _lowerings(checkpoint, dtype).write(place, lowering(how), weight_inputs=False, plan=plan)
    report = _build(model)
    assert report.get("built"), report["errors"]
    operators = [node.op_type for node in model.graph.graph]
    assert report["kinds"].get("QUANTIZE", 0) == operators.count("QuantizeLinear")
    assert report["kinds"]["DEQUANTIZE"] == operators.count("DequantizeLinear")
    plugins = sum(node.domain == "qwenforge" for node in model.graph.graph)
    assert report["kinds"].get("PLUGIN_V3", 0) == plugins
    table = TABLES.setdefault("quantized engines built by TensorRT for RTX", [_HEAD])
    table.append(
        f"{name:<10}{how:<10}{dtype:<6}{scheme:<18}{operators.count('QuantizeLinear'):>5}"
        f"{operators.count('DequantizeLinear'):>5}{plugins:>8}{report['engine_bytes'] / 1e6:>11.2f}"
    )
