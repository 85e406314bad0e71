"""Lowered graphs, parsed and built into engines by TensorRT for RTX, which needs no GPU for it.

Tiny checkpoints whole, and one decoder layer of each published model at its true width, with its matrices as inputs of
the engine. What a build proves: that every node is understood with the types and shapes it has (networks are strongly
typed), and that our plugins are found, agree to types, formats, shapes and aliasing, and fit into an engine. What the
engine computes on a GPU it cannot prove; the numbers are :mod:`test_tensorrt`'s.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from support.checkpoints import Kind, make_checkpoint
from support.lowered_files import LoweredFile, Lowerings
from support.plugin_library import plugin_library
from support.plugin_library import why_missing as why_no_library
from support.rtx_standin import standin
from support.rtx_standin import why_missing as why_no_standin
from support.source_tree import ROOT
from support.summary import TABLES
from support.tensorrt_choices import lowering
from support.true_width import sparse_checkpoint

pytestmark = pytest.mark.skipif(
    bool(why_no_standin() or why_no_library()), reason=why_no_standin() or why_no_library() or "-"
)

CAPACITY = 4096
MEMORY_LIMIT = 8e9
LOWERED_AS = [(how, dtype) for how in ("rtx", "plugin") for dtype in ("fp16", "bf16")] + [("opset 20", "fp16")]
DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
TRUE_WIDTHS = ("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "qwen2-57b-a14b", "qwen2-72b")
EXAMPLES = {"example, dense": "tiny-qwen2", "example, MoE": "tiny-qwen2-moe"}
TINY: dict[str, tuple[Kind, dict[str, Any]]] = {
    "tiny, tied": ("qwen2", {"tie_word_embeddings": True}),
    "tiny MoE": ("qwen2_moe", {}),
    "one KV head of 7": ("qwen2", {"hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "64 experts, top 8": (
        "qwen2_moe",
        {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 64, "num_attention_heads": 1}
        | {"num_key_value_heads": 1},
    ),
    "dense among MoE": ("qwen2_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    "sliding window": ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}),
    "qwen3 MoE": ("qwen3_moe", {"head_dim": 64, "norm_topk_prob": True}),
}
_HEAD = (
    f"{'graph':<28}{'lowering':<10}{'type':<6}{'layers':>7}{'plugins':>8}{'engine MB':>11}"
    f"{'weights as inputs MB':>22}{'seconds':>9}{'RSS MB':>8}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("builds")


_TRACED: dict[tuple[Path, str], Lowerings] = {}


def _lowered(checkpoint: Path, how: str, dtype: str, *, capacity: int, weight_inputs: bool) -> LoweredFile:
    key = (checkpoint, dtype)
    if key not in _TRACED:
        _TRACED[key] = Lowerings(checkpoint, DTYPES[dtype], capacity)
    place = checkpoint.with_name(f"{checkpoint.name}-{how}-{dtype}")
    return _TRACED[key].write(place, lowering(how), weight_inputs=weight_inputs)


def _build(model: LoweredFile, *options: str, plugins: bool = True, timeout: float = 240) -> dict[str, Any]:
    """What the stand-in's build.py reports of ``model``."""
    script = Path(__file__).parent.parent / "support" / "rtx_standin" / "build.py"
    library = ["--plugins", str(plugin_library())] if plugins and model.needs_plugins else []
    finished = standin().run(script, model.path, *library, *options, timeout=timeout)
    assert finished.stdout, f"the build crashed with exit code {finished.returncode}: {finished.stderr}"
    report: dict[str, Any] = json.loads(finished.stdout)
    return report


def _record(name: str, how: str, dtype: str, model: LoweredFile, report: dict[str, Any]) -> None:
    """Add a row to the table that is printed at the end."""
    table = TABLES.setdefault("engines built by TensorRT for RTX", [_HEAD])
    table.append(
        f"{name:<28}{how:<10}{dtype:<6}{report['layers']:>7}{report['kinds'].get('PLUGIN_V3', 0):>8}"
        f"{report['engine_bytes'] / 1e6:>11.2f}{model.input_bytes / 1e6:>22.1f}{report['seconds']:>9.2f}"
        f"{report['peak_bytes'] / 1e6:>8.0f}"
    )


def _check(model: LoweredFile, report: dict[str, Any], dtype: str) -> None:
    assert report.get("built"), report["errors"]
    operators = [node.op_type for node in model.graph.graph]
    plugins = sum(node.domain == "qwenforge" for node in model.graph.graph)
    assert report["kinds"].get("PLUGIN_V3", 0) == plugins
    assert report["kinds"].get("KV_CACHE_UPDATE", 0) == operators.count("TensorScatter")
    types = dict(report["outputs"])
    assert types.pop("logits") == "FLOAT"
    assert set(types.values()) == {{"fp16": "HALF", "bf16": "BF16"}[dtype]}
    assert report["peak_bytes"] < MEMORY_LIMIT


@pytest.mark.parametrize(("how", "dtype"), LOWERED_AS)
@pytest.mark.parametrize("name", TRUE_WIDTHS)
def test_layer_at_true_width_is_built(name: str, how: str, dtype: str, folder: Path) -> None:
    checkpoint = folder / name
    if not checkpoint.exists():
        sparse_checkpoint(checkpoint, name)
    model = _lowered(checkpoint, how, dtype, capacity=CAPACITY, weight_inputs=True)
    report = _build(model)
    _check(model, report, dtype)
    _record(f"{name}, one layer", how, dtype, model, report)


@functools.cache
def _tiny(folder: Path, name: str) -> Path:
    if name in EXAMPLES:
        return Path(shutil.copytree(ROOT / "examples" / "checkpoints" / EXAMPLES[name], folder / EXAMPLES[name]))
    kind, config = TINY[name]
    return make_checkpoint(folder / name.replace(" ", "-"), kind, dtype="bfloat16", tokenizer=False, **config)


@pytest.mark.parametrize(("how", "dtype"), LOWERED_AS)
@pytest.mark.parametrize("name", [*EXAMPLES, *TINY])
def test_tiny_model_is_built(name: str, how: str, dtype: str, folder: Path) -> None:
    model = _lowered(_tiny(folder, name), how, dtype, capacity=256, weight_inputs=False)
    report = _build(model, "--max-sequence", "256")
    _check(model, report, dtype)
    _record(name, how, dtype, model, report)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_expert_layer_is_parsed(dtype: str, folder: Path) -> None:
    """TensorRT for RTX knows the layer, but has no kernels for it on its GPUs: parsing is as far as it goes."""
    model = _lowered(_tiny(folder, "tiny MoE"), "native experts", dtype, capacity=256, weight_inputs=False)
    assert _build(model, "--parse-only")["parsed"]


def test_graph_without_its_plugin_library_is_refused(folder: Path) -> None:
    model = _lowered(_tiny(folder, "tiny MoE"), "rtx", "bf16", capacity=256, weight_inputs=False)
    report = _build(model, plugins=False)
    assert not report["parsed"] and any("Plugin not found" in error for error in report["errors"])


def _bias_in_fp32(model: ir.Model) -> None:
    bias = next(value for name, value in model.graph.initializers.items() if name.endswith("q_proj.bias"))
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy().astype(np.float32), name=bias.name)
    bias.dtype = ir.DataType.FLOAT


def _field(op: str, name: str, value: int) -> Callable[[ir.Model], None]:
    def fault(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == op)
        node.attributes[name] = ir.AttrInt64(name, value)

    return fault


def _missing_field(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "QwenForgeMoE")
    del node.attributes["top_k"]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (_bias_in_fp32, "first input has type BFloat16 but second input has type Float"),
        (_field("QwenForgeMoE", "num_experts", 9), "dimension 1 of router_logits is 6, but num_experts is 9"),
        (_field("QwenForgeMoE", "layout_version", 2), "layout_version is 2"),
        (_field("QwenForgeMoE", "top_k", 7), "top_k is larger than num_experts"),
        (_field("QwenForgeAttention", "cache_type", 1), "9 inputs were given, not 11"),
        (_missing_field, "top_k"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_planted_fault_is_refused_with_its_reason(fault: Callable[[ir.Model], None], error: str, folder: Path) -> None:
    """The proof can fail: at a wrong type, and at wrong fields of plugins."""
    good = _lowered(_tiny(folder, "tiny MoE"), "plugin", "bf16", capacity=256, weight_inputs=False)
    model = ir.load(good.path)
    fault(model)
    wrong = good.path.with_name("wrong.onnx")  # beside the data of the right one
    wrong.write_bytes(ir.to_proto(model).SerializeToString())
    report = _build(LoweredFile(wrong, model, 0))
    assert not report.get("built")
    assert any(error in line for line in report["errors"]), report["errors"]
