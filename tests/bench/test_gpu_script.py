"""tests/gpu without a GPU: what run.sh says is missing, and what summary.py makes of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
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
    text = (FOLDER / "run.sh").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines()]
    limits = {line[2]: int(line[3]) for line in lines if line[:1] == ["part"]}
    (budget,) = (int(line[0].removeprefix("budget=")) for line in lines if line and line[0].startswith("budget="))
    assert limits and sum(limits.values()) <= budget < 600
    assert {*summary().TESTS, "peers", "times", "attention-times", "models"} == limits.keys() - {"build", "library"}


@pytest.mark.parametrize(
    ("chosen", "prefixes"),
    [
        ("attention", ["attention-"]),
        ("moe,models", ["first", "peers", "times", "correctness", "memcheck", "racecheck"]),
    ],
)
def test_chosen_parts_alone_are_run_and_share_the_time(chosen: str, prefixes: list[str], tmp_path: Path) -> None:
    """With tools that do nothing but succeed: what is run, for how long, and what becomes of a part that fails."""
    environment = _machine(tmp_path) | {"PARTS": chosen}
    tools = Path(environment["PATH"])
    for name in ("tail", "cut", "head", "timeout"):
        (tools / name).symlink_to(shutil.which(name) or name)
    for name, line in {"python": "echo $@", "cmake": "echo $@", "compute-sanitizer": "exit 1"}.items():
        (tools / name).unlink(missing_ok=True)
        (tools / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    copy = tmp_path / "copy" / "tests" / "gpu"
    copy.mkdir(parents=True)
    shutil.copy(FOLDER / "run.sh", copy)
    (copy.parent.parent / "build" / "gpu-work").mkdir(parents=True)
    command = [shutil.which("bash") or "bash", copy / "run.sh"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert finished.returncode == 0 and finished.stderr == ""
    parts = summary().parts((tmp_path / "out" / "parts.txt").read_text(encoding="utf-8"))
    planned = (tmp_path / "out" / "planned.txt").read_text(encoding="utf-8").split()
    assert list(parts) == planned and planned[0] == "build"
    wanted = [*prefixes, *(["library", "models"] if "models" in chosen else [])]
    assert all(name.startswith(tuple(wanted)) for name in planned[1:])
    assert len(planned) - 1 == (5 if chosen == "attention" else 8)
    for name, part in parts.items():
        failed = name.endswith(("memcheck", "racecheck"))
        assert part["exit_code"] == (summary().NO_SANITIZER if failed else 0), part
        assert not failed or part["last_line"] == "compute-sanitizer does not work here"
    log = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    limits = [int(line.split()[2]) for line in log.splitlines() if line.startswith("== ")]
    assert len(limits) == len(planned) and 550 < sum(limits) <= 590, "those left out leave their time"
    if chosen == "attention":
        assert f"--limit {limits[planned.index('attention-times')] - 10}" in parts["attention-times"]["last_line"]


def test_part_of_another_name_is_refused(tmp_path: Path) -> None:
    command = [shutil.which("bash") or "bash", FOLDER / "run.sh"]
    environment = _machine(tmp_path, modules="torch numpy pytest ml_dtypes") | {"PARTS": "moe,attn"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert finished.returncode == 1
    assert finished.stderr == ("tests/gpu/run.sh: error: PARTS has attn, which is none of moe, attention, models\n")


def test_layout_is_qwenforge_without_an_installation(tmp_path: Path) -> None:
    """In a Python that does not process .pth files, and so knows nothing of an editable installation."""
    subprocess.run([sys.executable, "-P", FOLDER / "layout.py", tmp_path / "python"], check=True)
    makefile = (FOLDER.parent.parent / "Makefile").read_text(encoding="utf-8")
    (stages,) = (line.split()[2:] for line in makefile.splitlines() if line.startswith("STAGES :="))
    assert {*stages, "manifest.py", "cli"} <= {path.name for path in (tmp_path / "python" / "qwenforge").iterdir()}
    code = (
        "import qwenforge, qwenforge.bench.gpu_model_runs, qwenforge.engine.export, qwenforge.bench.kernels\n"
        "print(qwenforge.__version__, qwenforge.bench.kernels.__file__)"
    )
    path = f"{tmp_path / 'python'}:{sysconfig.get_path('purelib')}"
    command = [sys.executable, "-S", "-P", "-c", code]
    found = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, check=True).stdout
    version = (FOLDER.parent.parent / "VERSION").read_text(encoding="utf-8").strip()
    assert found == f"{version} {tmp_path / 'python' / 'qwenforge' / 'bench' / 'kernels.py'}\n"


def _run(folder: Path, row: dict[str, Any] | None, codes: dict[str, int], planned: Sequence[str] = ()) -> int:
    (folder / "gpu.txt").write_text("NVIDIA H200\n", encoding="utf-8")
    (folder / "planned.txt").write_text("\n".join(["build", *(planned or summary().TESTS)]), encoding="utf-8")
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
    assert "times                 exit 124     7 s  3 passed in 2 s" in lines
    assert _run(tmp_path, ROW, {}) == 0  # report.json is not taken for a part's


@pytest.mark.parametrize(
    ("change", "codes", "words"),
    [
        ({"wide_relative_difference": 0.2}, {}, "WRONG: wide_relative_difference 0.2"),
        ({"eight_relative_difference": float("nan")}, {}, "WRONG: eight_relative_difference nan"),
        ({"bits_changed": ["wide"]}, {}, "WRONG: replays of wide gave other bits"),
        ({"times": {}, "left_out": {"wide": "no"}}, {}, "none of our paths ran: {'wide': 'no'}"),
        ({}, {"racecheck": 1}, "racecheck             exit   1"),
        (None, {}, "first                 exit   0"),
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
