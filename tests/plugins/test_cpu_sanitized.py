"""Parts of libqwenforge_cpu.so compiled with sanitizers: its threads, and its arithmetic on buffers of exact size."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from support.source_tree import ROOT

PLUGINS = ROOT / "plugins"
CPP = ROOT / "tests" / "cpp"
_FLAGS = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror", f"-I{PLUGINS}", "-pthread"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-Wno-maybe-uninitialized"]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def _compile(output: Path, sources: list[Path], *flags: str) -> Path:
    finished = subprocess.run(
        ["g++", *_FLAGS, *flags, *map(str, sources), "-o", str(output)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return output


def _run(program: Path) -> None:
    finished = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@needs_compiler
def test_stages_have_no_race(tmp_path: Path) -> None:
    """Of tasks that have a thread each, and of several that one thread does one after the other."""
    sources = [CPP / "cpu_stages.cpp", PLUGINS / "cpu" / "team.cpp"]
    _run(_compile(tmp_path / "stages", sources, "-O1", "-fsanitize=thread"))


@needs_compiler
def test_products_keep_to_their_buffers(tmp_path: Path) -> None:
    """With every instruction set that this machine has, each compiled alone with its flags as in the library."""
    sanitizers = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    parts = {"baseline": [], "avx2": _AVX2, "avx512": _AVX512}
    if platform.machine() not in ("x86_64", "AMD64"):
        parts = {"baseline": []}
    objects = [
        _compile(tmp_path / f"{name}.o", [PLUGINS / "cpu" / f"products_{name}.cpp"], "-c", *flags, *sanitizers)
        for name, flags in parts.items()
    ]
    sources = [
        CPP / "cpu_products.cpp",
        *(PLUGINS / "cpu" / f"{name}.cpp" for name in ("quantized_matrix", "instruction_set")),
    ]
    _run(_compile(tmp_path / "products", [*sources, *objects], *sanitizers))
