"""``qwenforge optimize``: its table, its refusals, and a planted wrong rule that it must name and leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.cli.main import main
from qwenforge.graph_passes import lower, pipeline
from qwenforge.graph_passes.infra import FusionPass
from qwenforge.graph_passes.verify import verify_rewrite
from support.foreign_graphs import ForeignGraph, foreign_model
from support.toy_attention import toy_attention


class DoubleTranspose(FusionPass):
    """A right rule: the value transposed twice more, which changes the graph and not the function."""

    name: ClassVar[str] = "double_transpose"

    def run(self, model: ir.Model) -> None:
        value = next(value for node in model.graph for value in node.outputs if value.name == "y")
        users = list(value.uses())
        first = ir.node("Transpose", [value], {"perm": [0, 2, 1]})
        second = ir.node("Transpose", [first.outputs[0]], {"perm": [0, 2, 1]})
        for node, index in users:
            node.replace_input_with(index, second.outputs[0])
        producer = value.producer()
        assert producer is not None
        model.graph.insert_after(producer, [first, second])
        self.matches = 1


class DropKeyRotation(FusionPass):
    """The planted bug: keys enter attention and the cache without their rotation."""

    name: ClassVar[str] = "drop_key_rotation"

    def run(self, model: ir.Model) -> None:
        rotated = next(value for node in model.graph for value in node.outputs if value.name == "k")
        rotary = rotated.producer()
        assert rotary is not None and rotary.inputs[0] is not None
        rotated.replace_all_uses_with(rotary.inputs[0])
        self.matches = 1


class ScaleWeights(FusionPass):
    """The planted subtle bug: one weight one percent larger."""

    name: ClassVar[str] = "scale_weights"

    def run(self, model: ir.Model) -> None:
        weight = model.graph.initializers["wv"]
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.01), name="wv")
        self.matches = 1


class LookAlike(FusionPass):
    """A rule that finds only something it must leave alone."""

    name: ClassVar[str] = "look_alike"

    def run(self, model: ir.Model) -> None:
        self.fail("the softmax is over another axis")


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    ir.save(toy_attention("growing"), path)
    return path


def _plant(monkeypatch: pytest.MonkeyPatch, *rules: type[FusionPass]) -> None:
    monkeypatch.setattr(pipeline, "portable_rules", lambda positions: [rule() for rule in rules])
    monkeypatch.setattr(lower, "lowering_rules", lambda target, **_: [])


@pytest.mark.parametrize("planted", [DropKeyRotation, ScaleWeights])
def test_planted_wrong_rule_is_named_and_refused_while_the_rest_is_applied(
    planted: type[FusionPass],
    model_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _plant(monkeypatch, DoubleTranspose, planted, LookAlike)
    output = model_file.with_name("out.onnx")
    code = main(["optimize", str(model_file), "-o", str(output), "--verify", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 1
    assert report["refused"] == [planted.name]
    right, wrong, other = report["rules"]
    assert right["accepted"] and right["error"] < 1e-6 and right["nodes_after"] == right["nodes_before"] + 2
    assert not wrong["accepted"] and wrong["error"] > 1e-3 and "beyond the bound" in wrong["reason"]
    assert other["accepted"] and other["matches"] == 0 and "another axis" in other["reason"]
    written = ir.load(output)
    assert verify_rewrite(toy_attention("growing"), written).ok, "the refused rewrite is not in the written model"
    assert sum(node.op_type == "Transpose" for node in written.graph) == 5 + 2, "the accepted one is"


def test_table_names_every_rule_and_warns_of_the_refused_one(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant(monkeypatch, DoubleTranspose, DropKeyRotation, LookAlike)
    output = model_file.with_name("out.onnx")
    assert main(["optimize", str(model_file), "-o", str(output), "--verify"]) == 1
    text = capsys.readouterr().out
    for heading in ("rule", "matches", "nodes before", "nodes after", "error"):
        assert heading in text
    assert "REFUSED: rule drop_key_rotation" in text
    assert "warning: written without the rewrites of refused rules: drop_key_rotation" in text
    assert "note: rule look_alike: the softmax is over another axis" in text


def test_all_rules_accepted_exits_zero_and_disabled_rule_is_left_out(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant(monkeypatch, DoubleTranspose, DropKeyRotation)
    output = model_file.with_name("out.onnx")
    arguments = ["optimize", str(model_file), "-o", str(output), "--verify", "--json"]
    assert main([*arguments, "--disable", "drop_key_rotation"]) == 0
    assert [rule["rule"] for rule in json.loads(capsys.readouterr().out)["rules"]] == ["double_transpose"]


def test_wrong_rule_passes_unnoticed_without_verify(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant(monkeypatch, DropKeyRotation)
    output = model_file.with_name("out.onnx")
    assert main(["optimize", str(model_file), "-o", str(output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] is False and report["rules"][0]["error"] is None


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["optimize", *arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, "one sentence"
    return lines[0]


def test_output_onto_the_input_is_refused(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model_file.read_bytes()
    same = model_file.parent / "." / model_file.name
    assert "is the input itself" in _error(capsys, str(model_file), "-o", str(same))
    assert model_file.read_bytes() == before


def test_unknown_rule_to_disable_is_refused_with_the_known_ones(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant(monkeypatch, DoubleTranspose)
    output = model_file.with_name("out.onnx")
    message = _error(capsys, str(model_file), "-o", str(output), "--disable", "no_such_rule")
    assert "no_such_rule" in message and "double_transpose" in message
    assert not output.exists()


def test_missing_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a file" in _error(capsys, str(tmp_path / "none.onnx"), "-o", str(tmp_path / "out.onnx"))


def test_file_that_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("this is not a protobuf")
    assert "text.onnx" in _error(capsys, str(path), "-o", str(tmp_path / "out.onnx"))


def test_output_in_a_missing_folder_is_refused(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = model_file.parent / "none" / "out.onnx"
    assert "does not exist" in _error(capsys, str(model_file), "-o", str(output))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_external_data_is_refused_naming_the_file(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "in.onnx", tmp_path / "in.onnx.data"
    ir.save(toy_attention("growing"), path, external_data=data.name, size_threshold_bytes=0)
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-64])
    message = _error(capsys, str(path), "-o", str(tmp_path / "out.onnx"))
    assert "in.onnx.data" in message and damage in message.replace("ends before", "truncated")


def test_model_with_external_data_is_rewritten_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant(monkeypatch, DoubleTranspose)
    path, output = tmp_path / "in.onnx", tmp_path / "out.onnx"
    ir.save(toy_attention("growing"), path, external_data="in.onnx.data", size_threshold_bytes=0)
    assert main(["optimize", str(path), "-o", str(output), "--verify", "--json"]) == 0
    path.unlink()
    (tmp_path / "in.onnx.data").unlink()
    assert verify_rewrite(toy_attention("growing"), ir.load(output)).ok


@pytest.mark.parametrize(("attention", "op"), [("native", "GroupQueryAttention"), ("plugin", "QwenForgeAttention")])
def test_foreign_graph_is_lowered_for_ort_cuda(tmp_path: Path, attention: str, op: str) -> None:
    model = foreign_model(ForeignGraph(attention="sdpa", opset=23, dtype="float16"))
    ir.save(model, tmp_path / "in.onnx")
    command = ["optimize", tmp_path / "in.onnx", "-o", tmp_path / "out.onnx", "--target", "ort-cuda", "--verify"]
    assert main([*map(str, command), "--attention", attention]) == 0
    found = [node.op_type for node in ir.load(tmp_path / "out.onnx").graph]
    assert found.count(op) == 2


def test_foreign_graph_in_fp32_is_refused_for_ort_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ir.save(foreign_model(ForeignGraph()), tmp_path / "in.onnx")
    command = ["optimize", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx"), "--target", "ort-cuda"]
    assert main(command) == 1
    assert "compute in 16 bits; export the model in fp16 or bf16" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
