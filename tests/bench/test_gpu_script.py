"""tests/gpu without a GPU: what run.sh says is missing, and what summary.py makes of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.gpu_script import FOLDER, summary

ROW = {
    "layer": "L",
    "weights": "bf16",
    "tokens": 8,
    "routing": "uniform",
    "floor_us": 50.0,
    "times": {name: {"us": {"median": us}} for name, us in (("eight", 80.0), ("wide", 100.0), ("triton", 120.0))},
    "eight_relative_difference": 0.01,
    "wide_relative_difference": 0.01,
    "bits_changed": [],
    "left_out": {},
}


def _machine(folder: Path, *, gpu: bool = True, nvcc: bool = True, modules: str = "") -> dict[str, str]:
    """An environment whose PATH has the usual tools, and these for a GPU; Python has ``modules`` alone, if any."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "cat", "tee", "rm", "ln", "env"):
        (tools / name).symlink_to(shutil.which(name) or name)
    scripts = {"python": f'exec {sys.executable} -S "$@"'}
    scripts |= {"nvidia-smi": "echo 'A GPU, 1 MiB, 580, 9.0'"} if gpu else {}
    scripts |= {"nvcc": "exit 0"} if nvcc else {}
    for name, line in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    for name in modules.split():
        (folder / f"{name}.py").touch()
    return {"PATH": str(tools), "PYTHON": "python", "PYTHONPATH": str(folder), "OUT": str(folder / "out")}


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ({"gpu": False}, "no NVIDIA GPU is visible"),
        ({"nvcc": False}, "nvcc is not on PATH"),
        ({}, "python has no module torch: install it"),
        ({"modules": "torch numpy pytest"}, "python has no module ml_dtypes: install it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_missing_is_named_before_anything_is_built(
    missing: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    command = [shutil.which("bash") or "bash", FOLDER / "run.sh"]
    finished = subprocess.run(
        command, env=_machine(tmp_path, **missing), capture_output=True, text=True, check=False, timeout=60
    )
    assert finished.returncode == 1 and finished.stderr == f"tests/gpu/run.sh: error: {sentence}\n"


def test_parts_take_less_than_ten_minutes_and_know_their_names() -> None:
    lines = [line.split() for line in (FOLDER / "run.sh").read_text(encoding="utf-8").splitlines()]
    limits = {line[1]: int(line[2]) for line in lines if line[:1] == ["part"]}
    assert limits and sum(limits.values()) < 600
    assert {*summary().TESTS, "peers", "times"} <= limits.keys()


def _run(folder: Path, row: dict[str, Any] | None, codes: dict[str, int]) -> int:
    (folder / "gpu.txt").write_text("NVIDIA H200\n", encoding="utf-8")
    parts = {**dict.fromkeys(summary().TESTS, 0), **codes}
    (folder / "parts.txt").write_text("".join(f"{name} {code} 7 3 passed in 2 s\n" for name, code in parts.items()))
    if row is not None:
        (folder / "peers.json").write_text(json.dumps({"moe": [row]}), encoding="utf-8")
    return int(summary().main(folder))


def test_report_has_the_parts_the_times_and_the_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMIT", "0123abcd")
    assert _run(tmp_path, ROW, {"memcheck": summary().NO_SANITIZER, "times": 124}) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["commit"] == "0123abcd" and report["gpu"] == "NVIDIA H200" and report["peers"] == {"moe": [ROW]}
    assert report["parts"]["times"] == {"exit_code": 124, "seconds": 7, "last_line": "3 passed in 2 s"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "L bf16 T=8 uniform: eight 80.0 us, 62 % of floor; 1.50x triton"
    assert "times        exit 124     7 s  3 passed in 2 s" in lines
    assert _run(tmp_path, ROW, {}) == 0  # report.json is not taken for a part's


@pytest.mark.parametrize(
    ("change", "codes", "words"),
    [
        ({"wide_relative_difference": 0.2}, {}, "WRONG: wide_relative_difference 0.2"),
        ({"eight_relative_difference": float("nan")}, {}, "WRONG: eight_relative_difference nan"),
        ({"bits_changed": ["wide"]}, {}, "WRONG: replays of wide gave other bits"),
        ({"times": {}, "left_out": {"wide": "no"}}, {}, "none of our paths ran: {'wide': 'no'}"),
        ({}, {"racecheck": 1}, "racecheck    exit   1"),
        (None, {}, "first        exit   0"),
    ],
)
def test_what_is_wrong_is_said_and_fails(
    change: dict[str, Any] | None, codes: dict[str, int], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path, None if change is None else {**ROW, **change}, codes) == 1
    assert words in capsys.readouterr().out


def test_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setitem(os.environ, "PATH", "/nowhere")
    assert summary().commit() == "unknown"
