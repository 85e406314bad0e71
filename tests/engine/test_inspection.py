"""What ``inspect`` says of fused graphs, foreign graphs, bundles and things that are neither."""

from __future__ import annotations

import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.bundle import BundleWriter
from qwenforge.cli.main import main
from qwenforge.engine.graph_layout import layout
from qwenforge.engine.inspection import inspect_model, read_model
from qwenforge.engine.inspection_html import render_page
from qwenforge.engine.layer_drawing import DrawnNode, draw, nodes_of_graph, nodes_of_record
from qwenforge.engine.layer_recognition import SCOPES_KEY, layer_in_name, recognize_layers
from qwenforge.engine.units import quantity, size
from qwenforge.engine.weight_kinds import weight_kind
from qwenforge.errors import BundleError, GraphError
from support.bundle_builder import bundle_facts
from support.fused_graph import EXPERTS, INTERMEDIATE, VOCAB, C, fused_graph

BEFORE = [
    {"op": "Constant", "inputs": [], "outputs": ["two"], "name": "c"},
    {"op": "Pow", "inputs": ["hidden", "two"], "outputs": ["square"], "name": "p"},
    {"op": "MatMul", "inputs": ["square", "model.layers.0.mlp.up_proj.weight"], "outputs": ["up"], "name": "m"},
    {"op": "Add", "inputs": ["hidden", "up"], "outputs": ["next"], "name": "<&>"},
]


def write_bundle(out: Path, kinds: list[str], before: Any = None, **changes: Any) -> Path:
    with BundleWriter(out) as writer:
        ir.save(fused_graph(kinds), writer.directory / "model.onnx", external_data="model.onnx.data")
        if before is not None:
            writer.add_json("layer_before.json", before)
        return writer.commit(bundle_facts(**changes))


def foreign_graph(*, names: bool = False, scopes: bool = False) -> ir.Model:
    """Two layers of MatMul, Shape and residual Add in somebody else's style: only ``w`` tells, unless asked."""
    nodes, initializers = [], []
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", C]))
    stream = x
    for layer in range(2):
        weight = ir.Value(name=f"h.{layer}.w", const_value=ir.tensor(np.zeros((C, C), np.float32)))
        initializers.append(weight)
        product = ir.Node("", "MatMul", [stream, weight], name=f"/model/layers.{layer}/MatMul" if names else None)
        negative = ir.Node("", "Neg", [product.outputs[0]])
        again = ir.Node("", "MatMul", [negative.outputs[0], weight])
        if scopes:
            for node in (product, negative, again):
                node.metadata_props[SCOPES_KEY] = (
                    f"['', 'model', 'model.layers.{layer}', 'model.layers.{layer}.mlp', 'x']"
                )
        residual = ir.Node("", "Add", [stream, again.outputs[0]])
        nodes += [product, negative, again, residual]
        stream = residual.outputs[0]
    bias = ir.Value(name=f"h.{0}.b", const_value=ir.tensor(np.zeros(C, np.float32)))
    initializers.append(bias)
    for at in (0, 5):  # one tensor, used in both layers, named after the first
        nodes.insert(at, ir.Node("", "Identity", [bias]))
    stream.name = "y"
    return ir.Model(
        ir.Graph([x], [stream], nodes=nodes, initializers=initializers, opset_imports={"": 20}, name="g"), ir_version=10
    )


def test_fused_graph_is_reported_layer_by_layer() -> None:
    report = inspect_model(fused_graph(["dense", "moe", "moe"]), "decoder")
    assert report.layers_from == "node names"
    assert [layer.feed_forward for layer in report.layers] == ["dense", *["MoE and shared expert"] * 2]
    assert {layer.attention for layer in report.layers} == {"GroupQueryAttention"}
    assert [layer.nodes for layer in report.layers] == [11, 17, 17]
    assert report.nodes_outside_layers == 3
    assert report.nodes == 48
    assert report.fused["attention"] == 3
    assert report.fused["mixture of experts"] == 2
    assert report.fused["residual and normalization"] == 3
    assert report.not_fused == ()
    assert report.outputs[0].shape == ("batch", "logits_count", VOCAB)


def test_parameters_are_counted_by_kind() -> None:
    weights = {group.kind: group for group in inspect_model(fused_graph(["dense", "moe"]), "decoder").weights}
    assert weights["embedding"].parameters == weights["lm_head"].parameters == VOCAB * C
    assert weights["experts"].parameters == 3 * EXPERTS * C * INTERMEDIATE
    assert weights["shared expert"].parameters == 3 * C * INTERMEDIATE + C
    assert weights["mlp"].parameters == 3 * C * INTERMEDIATE
    assert weights["router"].parameters == C * EXPERTS
    assert weights["norms"].parameters == 5 * C
    assert weights["rope tables"].tensors == 2
    assert all(group.bytes == 4 * group.parameters for group in weights.values())


def test_tied_embedding_is_an_embedding_and_counts_once() -> None:
    model = fused_graph(["dense"])
    graph = model.graph
    head, embedding = graph.initializers["lm_head.weight"], graph.initializers["model.embed_tokens.weight"]
    for node, position in list(embedding.uses()):
        node.replace_input_with(position, head)
    del graph.initializers["model.embed_tokens.weight"]
    assert weight_kind(head) == "embedding"
    kinds = [group.kind for group in inspect_model(model, "tied").weights]
    assert "embedding" in kinds
    assert "lm_head" not in kinds


def test_packed_weights_count_logical_parameters() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 64]))
    packed = ir.Value(name="model.layers.0.mlp.up_proj.q", const_value=ir.tensor(np.zeros((32, 2, 16), np.uint8)))
    scales = ir.Value(name="model.layers.0.mlp.up_proj.s", const_value=ir.tensor(np.zeros(64, np.float32)))
    attributes = {"K": 64, "N": 32, "bits": 4, "block_size": 32}
    node = ir.node("MatMulNBits", [x, packed, scales], attributes, domain="com.microsoft")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[packed, scales], opset_imports={"": 20}, name="g")
    weights = inspect_model(ir.Model(graph, ir_version=10), "q").weights
    described = {(group.kind, group.dtype, group.parameters, group.bytes) for group in weights}
    assert described == {("mlp", "int4 (packed)", 2048, 1024), ("mlp", "float32 (scales)", 0, 256)}


@pytest.mark.parametrize(
    ("style", "source"),
    [
        ({}, "weight and cache names"),
        ({"names": True}, "node names"),
        ({"scopes": True}, "module scopes"),
    ],
)
def test_layers_of_foreign_graphs_are_recognized(style: dict[str, bool], source: str) -> None:
    model = foreign_graph(**style)
    if source == "weight and cache names":
        # Each weight has two users here, as a shared one would: give the second its own name.
        for node in [node for node in model.graph if node.op_type == "MatMul"][1::2]:
            weight = node.inputs[1]
            assert weight is not None
            own = ir.Value(name=f"{weight.name}2", const_value=weight.const_value)
            model.graph.register_initializer(own)
            node.replace_input_with(1, own)
    layers = recognize_layers(model.graph)
    assert layers.source == source
    assert layers.indices == (0, 1)
    found = [[node.op_type for node in layers.nodes(index)] for index in layers.indices]
    assert found[0] == ["MatMul", "Neg", "MatMul", "Add"]
    assert found[1][:1] == ["MatMul"]
    assert "Identity" not in found[0] + found[1], "a tensor shared by two layers tells nothing"


def test_graph_without_layers_says_so() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Neg", [x])
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g"), ir_version=10)
    report = inspect_model(model, "g")
    assert (report.layers_from, report.layers, report.nodes_outside_layers) == (None, (), 1)
    assert "No layers recognized" in render_page(report, recognize_layers(model.graph))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.down_proj", 12),
        ("/model/layers.3/attn/MatMul", 3),
        ("m.model.layers.0", 0),
        ("transformer.h.7.attn", 7),
        ("layers_5_mlp", 5),
        ("players.3.x", None),
        ("model.layers.x", None),
        ("model.norm", None),
        ("", None),
        (None, None),
    ],
)
def test_layer_number_in_a_name(name: str | None, layer: int | None) -> None:
    assert layer_in_name(name) == layer


def test_unfused_patterns_are_pointed_out() -> None:
    x = ir.Value(name="past_key_values.0.key", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 2, 3, 4]))
    mean = ir.node("ReduceMean", [x])
    soft = ir.node("Softmax", [mean.outputs[0]])
    top = ir.node("TopK", [soft.outputs[0], None], num_outputs=2)
    grown = ir.node("Concat", [x, top.outputs[0]], {"axis": 2})
    grown.outputs[0].name = "present.0.key"
    graph = ir.Graph([x], grown.outputs, nodes=[mean, soft, top, grown], opset_imports={"": 20}, name="g")
    report = inspect_model(ir.Model(graph, ir_version=10), "g")
    assert [sentence.split(":")[0] for sentence in report.not_fused] == [
        "attention",
        "normalization",
        "experts",
        "cache",
    ]
    assert report.layers_from == "weight and cache names"


def test_nodes_in_subgraphs_count_with_their_layer() -> None:
    inner = ir.node("Identity", [ir.Value(name="t")])
    body = ir.Graph([], inner.outputs, nodes=[inner], name="body")
    condition = ir.Value(name="c", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    choice = ir.node("If", [condition], {"then_branch": body}, name="model.layers.0.choice")
    graph = ir.Graph([condition], choice.outputs, nodes=[choice], opset_imports={"": 20}, name="g")
    report = inspect_model(ir.Model(graph, ir_version=10), "g")
    assert (report.nodes, report.layers[0].nodes, report.nodes_outside_layers) == (2, 2, 0)


def test_weights_are_not_read(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "out", ["dense", "moe"])
    (bundle / "model.onnx.data").unlink()
    assert inspect_model(read_model(bundle / "model.onnx"), "m").fused["attention"] == 2


@pytest.mark.parametrize("data", [b"", b"junk" * 50, b"\x08\x07", b"\x00" * 64])
def test_file_that_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(GraphError, match="ONNX model"):
        read_model(path)


def test_cli_prints_text_for_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "out", ["dense", "moe"])
    assert main(["inspect", str(bundle), "--verify", "full"]) == 0
    text = capsys.readouterr().out
    for expected in ("files checked (full)", "GroupQueryAttention", "experts", "whole-model", "MoE and"):
        assert expected in text


def test_cli_json_holds_graph_and_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "out", ["dense", "moe"])
    assert main(["inspect", str(bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nodes"] == 31
    assert [layer["index"] for layer in report["layers"]] == [0, 1]
    assert report["verification"]["method"] == "whole-model"
    assert report["manifest"]["limits"]["max_length"] == 64
    assert main(["inspect", str(bundle / "model.onnx"), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert "manifest" not in alone
    assert alone["weights"] == report["weights"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["absent"], "absent does not exist; give"),
        (["junk.onnx"], "ONNX model"),
        (["empty"], "is not a qwenforge bundle"),
        (["damaged"], "model.onnx.data is missing"),
        (["good", "--html", "nowhere/page.html"], "cannot write"),
        (["odd", "--html", "page.html"], "layer_before.json has an unknown form"),
    ],
)
def test_cli_refuses_in_one_sentence(
    tmp_path: Path,
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("junk.onnx").write_bytes(b"junk" * 50)
    Path("empty").mkdir()
    write_bundle(Path("good"), ["dense"])
    write_bundle(Path("damaged"), ["dense"])
    write_bundle(Path("odd"), ["dense"], before=[{"operator": "Add"}])
    Path("damaged/model.onnx.data").unlink()
    assert main(["inspect", *arguments]) == 1
    captured = capsys.readouterr()
    assert reason in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


class _Page(html.parser.HTMLParser):
    """Collects tags, and addresses that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]


def test_page_is_self_contained_and_shows_before_and_after(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "out", ["dense", "moe"], before=BEFORE)
    assert main(["inspect", str(bundle), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.fetched == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in text
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles == ["before: as traced, 4 nodes", "after: layer 0, 11 nodes"]
    boxes = [["".join(group.itertext()) for group in svg.iter("{http://www.w3.org/2000/svg}g")] for svg in drawings]
    assert boxes[0] == ["Pow", "MatMulmlp.up_proj.weight", "Add", "hidden"]
    assert "com.microsoft::GroupQueryAttention" in boxes[1]


def test_page_escapes_names(tmp_path: Path) -> None:
    model = fused_graph(["dense"])
    for node in model.graph:
        if node.op_type == "Mul":
            node.op_type = "<script>alert(1)</script>"
    text = render_page(inspect_model(model, "<b>"), recognize_layers(model.graph))
    assert "<script" not in text
    assert "<b>&" not in text
    assert "&lt;script&gt;" in text


def test_layer_drawn_after_is_of_the_kind_recorded_before() -> None:
    model = fused_graph(["dense", "moe"])
    layers, report = recognize_layers(model.graph), inspect_model(model, "m")
    routed = [DrawnNode("TopK", ("x",), ("y", "z"))]
    dense = [DrawnNode("Add", ("x",), ("y",))]
    assert "after: layer 1" in render_page(report, layers)
    assert "after: layer 1" in render_page(report, layers, before=routed)
    assert "after: layer 0" in render_page(report, layers, before=dense)


def test_record_of_another_form_is_refused() -> None:
    assert [node.weights for node in nodes_of_record(BEFORE)] == [(), (), ("mlp.up_proj.weight",), ()]
    records: list[Any] = [[{}], [3], 3, {"op": "Add"}]
    for record in records:
        with pytest.raises(BundleError, match="unknown form"):
            nodes_of_record(record)


def test_drawing_has_a_port_for_every_reader_of_a_busy_value() -> None:
    busy = [DrawnNode("Neg", ("position",), (f"n{index}",)) for index in range(5)]
    assert draw(busy).count('class="port"') == 5
    assert draw(busy[:3]).count('class="port"') == 1


def test_empty_drawing_is_an_empty_picture() -> None:
    assert ElementTree.fromstring(draw([])).tag.endswith("svg")


@pytest.mark.parametrize("seed", range(5))
def test_layout_points_down_and_keeps_boxes_apart(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = 40
    sizes = [(float(random.integers(20, 200)), float(random.integers(15, 50))) for _ in range(count)]
    pairs = random.integers(0, count, (70, 2))
    edges = sorted({(int(min(pair)), int(max(pair))) for pair in pairs if pair[0] != pair[1]})
    placed = layout(sizes, edges)
    for start, end in edges:
        assert placed.boxes[start].y + placed.boxes[start].height < placed.boxes[end].y
    for first in range(count):
        box = placed.boxes[first]
        assert box.x - box.width / 2 >= -1e-6
        assert box.x + box.width / 2 <= placed.width + 1e-6
        for other in placed.boxes[first + 1 :]:
            apart = abs(box.x - other.x) >= (box.width + other.width) / 2 - 1e-6
            assert apart or box.y + box.height <= other.y or other.y + other.height <= box.y
    for path in placed.paths:
        assert all(upper[1] <= lower[1] for upper, lower in pairwise(path))


def test_layout_refuses_a_cycle() -> None:
    with pytest.raises(ValueError, match="cycle"):
        layout([(10, 10)] * 2, [(0, 1), (1, 0)])


def test_drawn_layer_of_a_graph_names_its_weights() -> None:
    model = fused_graph(["moe"])
    drawn = {node.operator: node for node in nodes_of_graph(recognize_layers(model.graph).nodes(0))}
    assert drawn["com.microsoft::MoE"].weights == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert "cos_cache" not in drawn["com.microsoft::GroupQueryAttention"].inputs


def test_numbers_are_readable() -> None:
    assert [quantity(n) for n in (7280, 21_300, 494_000_000, 1_543_000_000)] == ["7280", "21.3 k", "494 M", "1.54 B"]
    assert [size(n) for n in (0, 999, 1000, 9_999_999, 3_087_000_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "10.0 MB",
        "3.09 GB",
    ]
