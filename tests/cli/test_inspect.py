"""``qwenforge inspect`` on a bundle that ``qwenforge export`` wrote; tests/engine/test_inspection.py has the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwenforge.cli.main import main
from support.command_line import qwenforge


def test_json_is_one_object_about_the_exported_graph(bundle: Path) -> None:
    finished = qwenforge("inspect", bundle, "--json")
    assert (finished.code, finished.err) == (0, "")
    report = json.loads(finished.out)
    assert report["fused"]["attention"] == len(report["layers"]) == 2
    assert report["not_fused"] == []
    assert report["verification"]["performed"] and report["verification"]["method"] == "whole-model"
    assert report["manifest"]["source"]["model_type"] == "qwen2"


def test_page_shows_a_layer_before_and_after_the_passes(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(bundle), "--html", str(page)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "page written to" in captured.out
    text = page.read_text(encoding="utf-8")
    assert "before: as traced, " in text and "after: layer 0, " in text


def test_changed_weights_are_found_by_the_full_check(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    with open(copy / "model.onnx.data", "r+b") as file:
        file.seek(file.seek(0, 2) // 2)
        file.write(b"\x55" * 8)
    assert main(["inspect", str(copy), "--verify", "full"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "model.onnx.data" in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["x", "--verify", "deep"], ["x", "y"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["inspect", *arguments])
    assert leaving.value.code == 2 and capsys.readouterr().out == ""


def test_path_that_no_file_can_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "a" * 5000]) == 1
    assert "cannot be reached (File name too long)" in capsys.readouterr().err
