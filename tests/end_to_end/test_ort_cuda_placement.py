"""Where ONNX Runtime's own CUDA provider puts the nodes of exported bundles: asked without a GPU, with a stand-in."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qwenforge import lowering_choice, names
from qwenforge.engine.export import export_checkpoint
from qwenforge.engine.ort_library import VARIABLE as LIBRARY_VARIABLE
from qwenforge.graph_passes.infra import constant, replace_node
from qwenforge.graph_passes.lower.ort_cuda_kernels import HOST_OPERATORS
from support.cuda_standin import Graphs, Placement, drive, place, why_missing
from support.ort_custom_op import ort_library
from support.source_tree import ROOT

pytestmark = pytest.mark.skipif(bool(why_missing()), reason=why_missing() or "-")

_FOLDER = TemporaryDirectory()
VOCABULARY = 2048
"""Of the example checkpoints."""
LENGTHS = {"attention.end", "attention.end.int32", "attention.last_key", "attention.total"}
"""What GroupQueryAttention needs of cache_position, computed once a step."""


def _library() -> Path:
    given = os.environ.get(LIBRARY_VARIABLE)
    return Path(given) if given else ort_library()


@functools.cache
def _model(checkpoint: str, dtype: str, **wishes: Any) -> Path:
    path = Path(_FOLDER.name) / "-".join([checkpoint, dtype, *wishes.values()])
    choice = lowering_choice.choose("ort-cuda", **wishes)
    source = ROOT / "examples" / "checkpoints" / checkpoint
    export_checkpoint(source, path, target="ort-cuda", dtype=dtype, choice=choice, verify_result=False)
    return path / "model.onnx"


def _only_integers_on_the_cpu(placed: Placement) -> None:
    assert {op for op, _ in placed.on_cpu} <= HOST_OPERATORS
    assert not any("layers." in name for _, name in placed.on_cpu)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_graph_with_attention_of_onnxruntime_is_on_the_gpu_but_for_its_lengths(dtype: str) -> None:
    """One copy to the device, of the last key of each row; cache_position is read on the host, the rest is not."""
    placed = place(_model("tiny-qwen2", dtype, attention="native"))
    _only_integers_on_the_cpu(placed)
    assert {name for _, name in placed.on_cpu} == LENGTHS and placed.copies == 1
    assert {name for name, memory in placed.inputs.items() if memory == "Cpu"} == {names.CACHE_POSITION}
    assert [op for op, _ in placed.on_cuda].count("GroupQueryAttention") == 3


@pytest.mark.parametrize(("experts", "op"), [("plugin", "QwenForgeMoE"), ("native", "MoE")])
def test_experts_are_on_the_gpu(experts: str, op: str) -> None:
    library = _library() if experts == "plugin" else None
    placed = place(_model("tiny-qwen2-moe", "bf16", attention="native", experts=experts), library=library)
    _only_integers_on_the_cpu(placed)
    assert len(placed.on_cpu) == len(LENGTHS) + 1, "and the shape of one Reshape"
    assert [each for each, _ in placed.on_cuda].count(op) == 3


def test_graph_with_attention_of_onnxruntime_cannot_be_captured() -> None:
    with pytest.raises(RuntimeError, match="cannot use the graph capture feature"):
        place(_model("tiny-qwen2", "bf16", attention="native"), capture=True)


def test_graph_with_our_ops_can_be_captured() -> None:
    placed = place(_model("tiny-qwen2-moe", "bf16", attention="plugin"), library=_library(), capture=True)
    _only_integers_on_the_cpu(placed)
    assert placed.copies == 0 and "Cpu" not in placed.inputs.values()


def test_runtime_drives_the_provider_with_everything_on_the_device() -> None:
    """bf16 caches, inputs, logits, row copies, batches that shrink; no kernel computes anything here."""
    assert drive(_model("tiny-qwen2", "bf16", attention="native"), VOCABULARY, capture=False) == Graphs(0, 0)


def test_runtime_has_decode_captured_once_a_batch_size_and_replayed_since(tmp_path: Path) -> None:
    """Two calls of four steps of two rows and three of one, the first of each captured; our op is left out here."""
    model = ir.load(_model("tiny-qwen2", "bf16", attention="plugin"))
    for node in [node for node in model.graph if node.op_type == "QwenForgeAttention"]:
        _replace_by_copies(model, node)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    assert drive(tmp_path / "model.onnx", VOCABULARY, capture=True) == Graphs(2, 2 * (4 + 3))


def _replace_by_copies(model: ir.Model, attention: ir.Node) -> None:
    """Query as it is for the output, and each cache as it came: nodes that have CUDA kernels."""
    heads, kv_heads, size = (
        attention.attributes[name].as_int() for name in ("num_heads", "num_key_value_heads", "head_size")
    )
    parts = constant(model, "parts", [heads * size, kv_heads * size, kv_heads * size])
    split = ir.node("Split", [attention.inputs[0], parts], {"axis": 2}, num_outputs=3, name=f"{attention.name}.split")
    for index, output in enumerate(split.outputs):
        output.name = f"{split.name}.{index}"
    caches = [ir.node("Identity", [attention.inputs[place]], name=f"{attention.name}.{place}") for place in (3, 4)]
    outputs = [split.outputs[0], *(cache.outputs[0] for cache in caches)]
    replace_node(model, attention, [split, *caches], outputs)


def test_node_without_a_kernel_would_show() -> None:
    """That the stand-in decides at all: an operator that the provider lacks goes to the CPU, with its copies."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Det", ["x"], ["d"], name="det"), helper.make_node("Sigmoid", ["d"], ["y"], name="s")]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [2, 3, 3])], [value("y", TensorProto.FLOAT, [2])]
    )
    path = Path(_FOLDER.name) / "det.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    placed = place(path)
    assert ("Det", "det") in placed.on_cpu and ("Sigmoid", "s") in placed.on_cuda and placed.copies == 1
