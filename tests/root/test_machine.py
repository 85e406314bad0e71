"""Describing this machine, and machines with GPUs by means of a stand-in driver tool."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwenforge import machine


def _driver_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_this_machine_has_processor_and_memory() -> None:
    found = machine.describe()
    assert found.processor.name
    assert found.processor.usable_threads >= 1
    assert 0 < found.available_bytes <= found.memory_bytes


def test_gpus_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver_tool(
        tmp_path,
        monkeypatch,
        "echo 'NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0'\necho 'NVIDIA Thor, [N/A], 580.00, 11.0'",
    )
    gpus = machine.describe().gpus
    assert gpus[0] == machine.Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, "580.65.06", "9.0")
    assert gpus[1].memory_bytes == 0
    assert gpus[1].compute_capability == "11.0"


def test_failing_driver_tool_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver_tool(tmp_path, monkeypatch, "exit 9")
    found = machine.describe()
    assert found.gpus == ()
    assert "nvidia-smi failed" in found.gpu_problem


def test_machine_without_driver_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.describe()
    assert found.gpus == ()
    assert found.gpu_problem == ""


def test_container_limit_caps_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1048576\n")
    unlimited = tmp_path / "unlimited"
    unlimited.write_text("max\n")
    monkeypatch.setattr(machine, "_MEMORY_LIMITS", (limit, unlimited, tmp_path / "absent"))
    assert machine.describe().memory_bytes == 1 << 20
