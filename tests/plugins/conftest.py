"""The library of CPU kernels that was built when qwenforge was installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from qwenforge.engine.cpu_library import LIBRARY, cpu_library, find_cpu_library
from support.cpu_runs import INSTRUCTION_SETS, Answer, Job, answers_by, supported_sets


@pytest.fixture(scope="session", name="cpu_library")
def _cpu_library() -> Path:
    """The path of libqwenforge_cpu.so, of this version."""
    found = cpu_library()
    if found is None:
        pytest.fail(f"qwenforge was installed without {LIBRARY}: install a C++ compiler, then 'make cpu'")
    return found.path


@pytest.fixture(scope="session", name="instruction_set", params=INSTRUCTION_SETS.values())
def _instruction_set(request: pytest.FixtureRequest, cpu_library: Path) -> str:
    """What QWENFORGE_CPU_ISA may ask for on this machine."""
    supported = supported_sets(find_cpu_library(cpu_library).instruction_set)
    if request.param not in supported:
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


@pytest.fixture(scope="module", name="answers")
def _answers(request: pytest.FixtureRequest, cpu_library: Path, instruction_set: str) -> Mapping[str, Answer]:
    """Of the module's ``JOBS``, each by its name, with one instruction set."""
    jobs: Mapping[str, Job] = request.module.JOBS
    return answers_by(cpu_library, instruction_set, jobs)
