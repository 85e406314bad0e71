"""Memory of an export: one real run on the tiny geometry, the bound, and the exit codes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qwenforge.bench import export_memory
from qwenforge.bench.export_memory import EXAMPLE, FIXED_BYTES, ExportRun, bound_bytes, main

STAGES = ["read checkpoint", "trace", "fuse", "instantiate", "lower", "write weights", "finish"]
"""Of an export that is not verified."""


@dataclass(frozen=True)
class Measured:
    """The program's one real run."""

    code: int
    work: Path
    report: dict[str, Any]

    @property
    def run(self) -> ExportRun:
        """What the export took."""
        return ExportRun(**{name: self.report[name] for name in ExportRun.__dataclass_fields__})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    work = tmp_path_factory.mktemp("memory")
    (work / "tiny-bundle").mkdir()
    (work / "tiny-bundle" / "thesis.txt").write_text("mine")
    options = ["--geometry", "tiny", "--work", str(work), "--no-verify", "--json", str(work / "report.json")]
    return Measured(main(options), work, json.loads((work / "report.json").read_text()))


@pytest.mark.parametrize(
    ("geometry", "dtype", "largest"),
    [("0.5b", "fp32", 151936 * 896 * 4), ("1.5b", "fp32", 151936 * 1536 * 4), ("1.5b", "fp16", 151936 * 1536 * 2)],
)
def test_bound_is_fixed_bytes_and_twice_the_largest_tensor(geometry: str, dtype: str, largest: int) -> None:
    assert FIXED_BYTES == 1_200_000_000
    assert bound_bytes(geometry, dtype) == 1_200_000_000 + 2 * largest


def test_tiny_export_is_measured_stage_by_stage(measured: Measured) -> None:
    assert measured.code == 0
    report = measured.report
    assert report["bound_bytes"] == 1_200_000_000 + 2 * 512 * 64 * 4
    assert report["within_bound"] and 50e6 < report["peak_rss_bytes"] <= report["bound_bytes"]
    assert list(report["stage_seconds"]) == STAGES
    assert list(report["stage_peak_rss_bytes"]) == ["start", *STAGES]
    assert 0 < max(report["stage_peak_rss_bytes"].values()) <= report["peak_rss_bytes"]
    assert report["stage_peak_rss_bytes"]["trace"] > report["stage_peak_rss_bytes"]["start"] > 0
    assert sum(report["stage_seconds"].values()) < report["wall_seconds"]
    settings = {"geometry": "tiny", "stored": "bf16", "dtype": "fp32", "target": "ort-cpu", "weights": "copy"}
    assert report["settings"] == settings | {"verify": False}
    assert report["report"]["verification"] is None
    assert report["machine"]["memory_bytes"] > 0 and "torch" in report["packages"] and report["date"]


def test_checkpoint_is_kept_the_bundle_removed_and_other_folders_left_alone(measured: Measured) -> None:
    assert sorted(path.name for path in measured.work.iterdir()) == ["report.json", "tiny-bf16", "tiny-bundle"]
    assert (measured.work / "tiny-bundle" / "thesis.txt").read_text() == "mine"


def test_missed_bound_exits_1_and_is_reported(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_memory, "run_export", lambda *_: measured.run)
    monkeypatch.setattr(export_memory, "FIXED_BYTES", 1_000_000)
    file = measured.work / "missed.json"
    try:
        assert main(["--geometry", "tiny", "--work", str(measured.work), "--no-verify", "--json", str(file)]) == 1
        report = json.loads(file.read_text())
    finally:
        file.unlink(missing_ok=True)
    assert (report["bound_bytes"], report["within_bound"]) == (1_000_000 + 2 * 512 * 64 * 4, False)
    text = capsys.readouterr().out
    assert "ABOVE the bound of 1 MB" in text
    for stage in ("start", *STAGES):
        assert stage in text


@pytest.mark.parametrize(("excess", "code"), [(0, 0), (1, 1)])
def test_bound_itself_is_within(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, excess: int, code: int
) -> None:
    run = replace(measured.run, peak_rss_bytes=bound_bytes("tiny", "fp16") + excess)
    monkeypatch.setattr(export_memory, "run_export", lambda *_: run)
    assert main(["--geometry", "tiny", "--work", str(tmp_path), "--dtype", "fp16"]) == code


def test_settings_reach_the_export(measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(export_memory, "run_export", lambda *args: asked.append(args) or measured.run)
    settings = ["--stored", "fp16", "--dtype", "fp16", "--target", "portable", "--weights", "link"]
    assert main(["--geometry", "tiny", "--work", str(tmp_path), *settings]) == 0
    ((checkpoint, bundle, options),) = asked
    assert checkpoint == tmp_path / "tiny-fp16"
    assert bundle.name == "tiny-bundle" and tmp_path in bundle.parents and not bundle.parent.exists()
    assert options == ["--target", "portable", "--dtype", "fp16", "--weights", "link"]


def test_export_that_fails_exits_1_after_its_own_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--geometry", "tiny", "--work", str(tmp_path), "--target", "npu"]) == 1
    theirs, ours = capfd.readouterr().err.splitlines()
    assert theirs.startswith("qwenforge: error: unknown target 'npu'")
    assert ours == f"error: the export of {tmp_path / 'tiny-bf16'} failed with exit code 1; see its message above"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-bf16"]


def test_report_that_cannot_be_written_is_refused_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_memory, "run_export", None)
    arguments = ["--geometry", "tiny", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "no" / "r.json")]
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"error: the folder {tmp_path / 'no'} does not exist: create it first.\n"
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example_and_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and EXAMPLE in capsys.readouterr().out
    for arguments in ([], ["--work", "x", "--geometry", "70b"], ["--work", "x", "--dtype", "bf16"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
