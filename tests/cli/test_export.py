"""``qwenforge export`` in a process of its own: the bundle, the streams, the refusals, and what an interrupt leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenforge.bundle import Bundle
from qwenforge.cli.main import main
from qwenforge.engine import export as export_module
from qwenforge.engine.export import ExportReport
from qwenforge.engine.verification import VerificationReport
from support.bundle_builder import write_bundle
from support.command_line import LONGEST_SECONDS, Finished, finish, interrupted_on_terminal, qwenforge, start

Damage = Callable[[Path], None]


def listing(folder: Path) -> dict[str, str]:
    """Every file under ``folder`` with its hash."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(folder: Path) -> list[str]:
    """What lies in ``folder``, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def edit_config(**fields: Any) -> Damage:
    """Change fields of config.json."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def keep_half_of_weights(folder: Path) -> None:
    """A download that broke off."""
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def overwrite_header(folder: Path) -> None:
    """Bytes that are no safetensors header."""
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * 64)


def test_export_writes_a_verified_bundle_and_one_json_object(exported: Any) -> None:
    finished = exported.finished
    assert (finished.code, finished.err) == (0, "")
    said = json.loads(finished.out)
    manifest = Bundle.open(exported.bundle, verify="full").manifest
    assert said["bundle"] == str(exported.bundle)
    assert (said["target"], said["dtype"], said["linked_bytes"]) == ("ort-cpu", "fp32", 0)
    assert said["data_bytes"] == (exported.bundle / "model.onnx.data").stat().st_size
    assert said["rules"]["grouped_query_attention"] == 1
    assert "verify against transformers" in said["seconds"]
    assert said["verification"]["method"] == manifest.verification.method == "whole-model"
    assert said["verification"]["max_abs_error"] == manifest.verification.max_abs_error
    assert said["verification"]["max_abs_error"] < said["verification"]["bound"]
    assert said["verification"]["token_disagreements"] == 0 and manifest.verification.greedy_match
    assert names(exported.bundle.parent) == ["bundle", "checkpoint"]


def test_unverified_export_says_so_on_stdout_and_in_the_bundle(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "not [made] yet" / "bundle"
    options = ["--no-verify", "--max-length", "64", "--max-batch", "3"]
    assert main(["export", str(checkpoint), "-o", str(out), *options]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert first.startswith(f"wrote {out}: ort-cpu fp32, ") and "MB of weights" in first
    assert second == "not verified (--no-verify)"
    assert captured.err == ""
    manifest = Bundle.open(out, verify="full").manifest
    assert manifest.verification.model_dump(exclude_none=True) == {"performed": False}
    assert (manifest.limits.max_length, manifest.limits.max_batch) == (64, 3)
    assert names(out.parent) == ["bundle"]


def test_summary_states_the_comparison_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verification = VerificationReport(
        method="whole-model", prompts=8, new_tokens=64, positions=843, strays=0, max_abs_error=1.9e-5, bound=2e-4,
        mean_kl=1e-12, max_kl=2e-11, token_disagreements=1, near_ties=1, graph_error=1e-5,
    )  # fmt: skip
    report = ExportReport(
        Path("b"), "ort-cpu", "fp32", [], nodes=32, data_bytes=425_984, linked_bytes=2_000_000,
        seconds={"trace": 2.0, "fuse": 0.5}, verification=verification,
    )  # fmt: skip
    monkeypatch.setattr(export_module, "export_checkpoint", lambda *_, **__: report)
    assert main(["export", "a", "-o", "b"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote b: ort-cpu fp32, 32 nodes, 0.4 MB of weights, 2.0 MB linked in 2.5 s",
        "verified against transformers (whole-model): max logit error 1.9e-05 (bound 2.0e-04), max KL 2.0e-11, "
        "tokens agree at 842/843 positions",
    ]


@pytest.mark.parametrize(
    ("damage", "where", "remedy"),
    [
        (shutil.rmtree, "checkpoint does not exist", "give the path"),
        (lambda folder: (folder / "config.json").unlink(), "checkpoint has no config.json", "give a Hugging Face"),
        (edit_config(model_type="llama"), "config.json: 'model_type' is 'llama'", "supported are qwen2"),
        (keep_half_of_weights, "model.safetensors", "download it again"),
        (overwrite_header, "model.safetensors", "download it again"),
    ],
)
def test_unusable_checkpoint_is_refused_in_one_sentence(
    checkpoint: Path, tmp_path: Path, damage: Damage, where: str, remedy: str
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    damage(copy)
    sentence = qwenforge("export", copy, "-o", tmp_path / "bundle").refusal()
    assert where in sentence and remedy in sentence
    assert set(names(tmp_path)) <= {"checkpoint"}


@pytest.mark.parametrize(
    ("options", "where", "remedy"),
    [
        (["--dtype", "bf16"], "target ort-cpu does not support dtype bf16", "choose fp32"),
        (["--dtype", "fp64"], "target ort-cpu does not support dtype fp64", "choose fp32"),
        (["--target", "ort-cuda", "--dtype", "fp32"], "target ort-cuda does not support dtype fp32", "choose bf16"),
        (["--target", "ort-cuda", "--tensorrt", "11.4"], "--tensorrt belongs to --target tensorrt", "leave it out"),
        (["--cache", "fp32"], "--cache fp32 is for qwenforge's CPU kernels", "leave it out"),
        (["--cache", "int8"], "--cache goes with --quantize RECIPE", "add it or leave this out"),
        (["--target", "npu"], "unknown target 'npu'", "use ort-cpu or ort-cuda or tensorrt"),
        (["--max-length", "100000"], "--max-length 100000 is beyond the model's 256 positions", "256"),
    ],
)
def test_impossible_wish_is_refused_in_one_sentence(
    checkpoint: Path, tmp_path: Path, options: list[str], where: str, remedy: str
) -> None:
    sentence = qwenforge("export", checkpoint, "-o", tmp_path / "bundle", *options, "--json").refusal()
    assert where in sentence and remedy in sentence
    assert names(tmp_path) == []


def test_folder_of_somebody_else_is_refused_and_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("mine")
    sentence = qwenforge("export", checkpoint, "-o", out).refusal()
    assert str(out) in sentence and "is not a bundle; choose another path" in sentence
    assert [names(tmp_path), (out / "chapter.txt").read_text()] == [["thesis"], "mine"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["checkpoint"],
        ["checkpoint", "-o", "bundle", "--weights-as", "files"],
        ["checkpoint", "-o", "bundle", "--max-length", "0"],
        ["checkpoint", "-o", "bundle", "--weights", "symlink"],
        ["checkpoint", "-o", "bundle", "--no-verif"],
        ["one", "two", "-o", "bundle"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["export", *arguments])
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: qwenforge ")


def test_help_names_every_option_and_an_example() -> None:
    finished = qwenforge("export", "--help")
    assert (finished.code, finished.err) == (0, "")
    for option in ("--target", "--dtype", "--weights", "--max-length", "--max-batch", "--no-verify", "--json"):
        assert option in finished.out
    assert "example:\n  qwenforge export examples/checkpoints/tiny-qwen2 -o tiny-bundle" in finished.out


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that holds an older bundle and nothing else."""
    folder = tmp_path / "place"
    write_bundle(folder / "bundle")
    return folder


def signalled_export(checkpoint: Path, place: Path, number: signal.Signals) -> Finished:
    """An export to ``place/bundle`` that got the signal as soon as it had a hidden folder there."""
    process = start("export", checkpoint, "-o", place / "bundle", "--json")
    give_up = time.monotonic() + LONGEST_SECONDS
    while not any(place.glob(".bundle.partial-*")):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < give_up
        time.sleep(0.01)
    process.send_signal(number)
    return finish(process)


def test_interrupt_exits_130_and_leaves_only_the_older_bundle(checkpoint: Path, place: Path) -> None:
    before = listing(place)
    finished = signalled_export(checkpoint, place, signal.SIGINT)
    assert (finished.code, finished.out, finished.err) == (130, "", "qwenforge: interrupted\n")
    assert listing(place) == before
    assert names(place) == ["bundle"]


def test_progress_is_drawn_on_stderr_until_an_interrupt_while_verifying(checkpoint: Path, place: Path) -> None:
    before = listing(place)
    finished = interrupted_on_terminal(["export", checkpoint, "-o", place / "bundle"], when="verify")
    assert (finished.code, finished.out) == (130, "")
    assert finished.err.index("trace") < finished.err.index("verify")
    assert finished.err.endswith("qwenforge: interrupted\r\n") and "Traceback" not in finished.err
    assert listing(place) == before
    assert names(place) == ["bundle"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_export_leaves_the_older_bundle_and_the_next_one_cleans_up(
    checkpoint: Path, place: Path, number: signal.Signals
) -> None:
    before = listing(place / "bundle")
    assert signalled_export(checkpoint, place, number).code == -number
    assert listing(place / "bundle") == before
    assert [name.split("-")[0] for name in names(place)] == [".bundle.partial", "bundle"]
    write_bundle(place / "bundle", model=b"newer")
    assert names(place) == ["bundle"]
