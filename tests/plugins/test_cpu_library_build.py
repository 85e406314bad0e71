"""How libqwenforge_cpu.so is compiled: without a warning, with few symbols, and no instruction where it may not run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from support.plugin_library import cmake
from support.source_tree import ROOT

SOURCES = ROOT / "plugins" / "cpu"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of its own, with warnings as errors."""
    folder = tmp_path_factory.mktemp("cpu")
    for step in (["-S", SOURCES, "-B", folder, "-G", "Ninja", "-DQWENFORGE_WERROR=ON"], ["--build", folder]):
        finished = cmake(*step)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def listed(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_exports_are_three_functions(build: Path) -> None:
    symbols = listed("nm", "-D", "--defined-only", build / "libqwenforge_cpu.so")
    assert {line.split()[-1] for line in symbols.splitlines()} == {
        *("RegisterCustomOps", "qwenforgeCpuInstructionSet", "qwenforgePluginsVersion")
    }


def test_library_needs_the_c_library_alone(build: Path) -> None:
    """The C++ runtime is inside: another one in the process, or an older one on the system, is no matter."""
    needed = re.findall(r"NEEDED.*\[(.+?)\]", listed("readelf", "-d", build / "libqwenforge_cpu.so"))
    assert {name.partition(".")[0] for name in needed} <= {"libc", "libm", "libpthread", "ld-linux-x86-64"}


def test_sources_of_an_instruction_set_share_no_functions_with_others(build: Path) -> None:
    """The linker keeps one copy of a function that several objects define: it must not need AVX."""
    objects = [path for path in build.rglob("*.o") if re.search(r"_avx\w*\.cpp\.o$", path.name)]
    names = {path.name.removesuffix(".o") for path in objects}
    assert names == {path.name for path in SOURCES.glob("*_avx*.cpp")}
    for path in objects:
        # W: defined here and perhaps elsewhere; u: one in the whole process.
        shared = re.findall(r"^\w+ [Wu] (.+)$", listed("nm", "-C", path), re.MULTILINE)
        assert shared == [], path.name
