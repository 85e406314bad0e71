"""The rules for norms, projections and experts on graphs of other people's exporters; what they compute stays."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest

from qwenforge.graph_passes.fuse.fold_weight_transforms import FoldWeightTransforms
from qwenforge.graph_passes.fuse.linear import GemmToMatMul
from qwenforge.graph_passes.fuse.moe_routing import FuseMixtureOfExperts
from qwenforge.graph_passes.fuse.rms_norm import FuseRMSNorm
from qwenforge.graph_passes.fuse.swiglu import FuseSwiGLU
from qwenforge.graph_passes.pipeline import prepare
from qwenforge.graph_passes.verify import Verifier
from support.foreign_graphs import ForeignGraph, foreign_model
from support.small_graphs import apply_rule

RENORMALIZED = (("norm_topk_prob", True),)
GRAPHS = {
    ForeignGraph(attention="sdpa", opset=23, dtype="float16"): {"norms": 5, "dense": 2},
    ForeignGraph(attention="sdpa", opset=23, dtype="bfloat16"): {"norms": 5, "dense": 2},
    ForeignGraph(kind="qwen3", dtype="float16", opset=18): {"norms": 9, "dense": 2},
    ForeignGraph(kind="moe", attention="sdpa"): {"norms": 5, "dense": 2, "experts": 2},
    ForeignGraph(kind="qwen3_moe", dtype="bfloat16", opset=21, config=RENORMALIZED): {"norms": 9, "experts": 2},
    ForeignGraph(
        kind="moe",
        exporter="onnx_exporter_prefill",
        attention="sdpa",
        experts="grouped_mm",
        dtype="bfloat16",
        opset=24,
        config=RENORMALIZED,
    ): {"norms": 5, "dense": 2, "experts": 2},
    ForeignGraph(kind="moe", static=True): {"norms": 5, "dense": 2, "experts": 2},
}
"""What each graph of two layers has: norms, SwiGLUs with a weight matrix (shared experts too), routed experts."""


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_exported_graph_is_fused_and_computes_the_same(graph: ForeignGraph) -> None:
    before = prepare(foreign_model(graph))
    model = before.clone()
    rules = [GemmToMatMul(), FuseMixtureOfExperts(), FoldWeightTransforms(), FuseRMSNorm(), FuseSwiGLU()]
    for rule in rules:
        apply_rule(rule, model)
        assert rule.failures == []
    counts, wanted = Counter(node.op_type for node in model.graph), Counter(GRAPHS[graph])
    assert counts["RMSNormalization"] == wanted["norms"]
    assert counts["Swish"] == wanted["dense"] and counts["MixtureOfExperts"] == wanted["experts"]
    # Only the gates of shared experts are left, and nothing of norms and routings.
    assert counts["Sigmoid"] == (wanted["experts"] if graph.kind == "moe" else 0)
    assert not counts.keys() & {"Gemm", "ReduceMean", "TopK", "CumSum"}
    for node in model.graph:
        if node.op_type == "MixtureOfExperts":
            attributes = {name: value.as_int() for name, value in node.attributes.items()}
            assert attributes == {"top_k": 3, "normalize_topk": int(graph.config == RENORMALIZED)}
            assert node.name is not None and node.name.startswith("model.layers.")
    outcome = Verifier(before).check(model)
    assert outcome.ok, outcome.summary()


def test_merged_projections_are_named_after_their_layers() -> None:
    model = prepare(foreign_model(ForeignGraph(attention="sdpa", opset=23, dtype="float16")))
    assert apply_rule(FuseSwiGLU(), model).matches == 2
    merged = [node.name for node in model.graph if str(node.name).endswith("gate_up_proj")]
    assert merged == [f"model.layers.{layer}.mlp.gate_up_proj" for layer in range(2)]
    assert all(isinstance(model.graph.initializers[f"{name}.weight"].shape, ir.Shape) for name in merged)
