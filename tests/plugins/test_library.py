"""The built plugin library: what it exports, what it needs, what it is for; and the header made of an op.yaml."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwenforge import __version__
from support.plugin_library import FOLDER, cmake, plugin_library, why_missing
from support.source_tree import ROOT

pytestmark = pytest.mark.skipif(bool(why_missing()), reason=why_missing() or "-")

SMS = (80, 86, 87, 89, 90, 100, 110, 120)
LIBRARY = "qwenforge_plugins"


def _output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_library_exports_three_functions_and_nothing_else() -> None:
    lines = _output("nm", "-D", "--defined-only", plugin_library()).splitlines()
    assert {line.split()[-1] for line in lines} == {"getCreators", "setLoggerFinder", "qwenforgePluginsVersion"}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_library_is_linked_to_neither_tensorrt_nor_cuda() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", _output("readelf", "-d", plugin_library()))
    assert needed and not [name for name in needed if re.match(r"lib(nv|cuda|cudart|tensorrt)", name)]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_experts_neither_allocate_nor_wait_nor_read_back() -> None:
    """All of CUDA's runtime that their objects call beside launches: a call can be captured in a CUDA graph."""
    plugin_library()
    objects = sorted((FOLDER / "plugins" / "CMakeFiles" / "qwenforge_kernels.dir" / "moe").glob("*.o"))
    assert len(objects) == 5
    called = set(re.findall(r" U (cu[A-Z]\w*|cuda\w*)", _output("nm", "-u", *objects)))
    assert called == {"cudaGetDevice", "cudaDeviceGetAttribute", "cudaGetLastError"}


def test_library_says_its_version() -> None:
    function = ctypes.CDLL(str(plugin_library())).qwenforgePluginsVersion
    function.restype = ctypes.c_char_p
    assert function().decode() == __version__


def test_library_holds_kernels_for_every_gpu() -> None:
    """A fat binary's entry names its architecture; the newest is there as PTX too."""
    data = plugin_library().read_bytes()
    assert all(re.search(rb"sm_%d\b" % sm, data) for sm in SMS)
    assert re.search(rb"compute_120\b", data) or b".target sm_120" in data


def test_official_headers_are_used_where_they_are_found(tmp_path: Path) -> None:
    """A header that stands for TensorRT's refuses to be compiled: every source of the library has to meet it."""
    headers, build = tmp_path / "include", tmp_path / "build"
    configure = ("--preset", "plugins", "-B", build, f"-DTENSORRT_INCLUDE_DIR={headers}")
    without = cmake(*configure)
    assert without.returncode and "there is no NvInferRuntime.h" in " ".join(without.stderr.split())
    headers.mkdir()
    (headers / "NvInferRuntime.h").write_text("#error the official header was read\n", encoding="utf-8")
    assert cmake(*configure).returncode == 0
    listed = re.search(rf"add_library\({LIBRARY} .*?\)", (ROOT / "plugins" / "CMakeLists.txt").read_text(), re.DOTALL)
    assert listed is not None
    sources = re.findall(r"\S+\.cpp", listed.group())
    compiled = cmake("--build", build, "--", "-k", "0", *(f"plugins/CMakeFiles/{LIBRARY}.dir/{s}.o" for s in sources))
    assert sources and compiled.stdout.count("error: #error the official header was read") == len(sources), (
        compiled.stdout
    )


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ((75, 80, 86, 87, 89, 90), "80-real;86-real;87-real;89-real;90"),
        ((80, 86, 87, 89, 90, 100, 101, 120), "80-real;86-real;87-real;89-real;90-real;100-real;120"),
        ((*SMS, 103, 121), "80-real;86-real;87-real;89-real;90-real;100-real;110-real;120"),
    ],
    ids=["CUDA 12.6", "CUDA 12.8", "CUDA 13"],
)
def test_older_compiler_builds_for_the_gpus_that_it_knows(known: tuple[int, ...], chosen: str, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(f"sm_{sm}" for sm in known) + "\n", encoding="utf-8")
    nvcc.chmod(0o755)
    script = tmp_path / "ask.cmake"
    module = ROOT / "cmake" / "CudaArchitectures.cmake"
    script.write_text(
        f'include("{module}")\ndefault_cuda_architectures(r "{nvcc}")\nmessage("${{r}}")\n', encoding="utf-8"
    )
    assert cmake("-P", script).stderr.strip() == chosen


@pytest.mark.parametrize("op", ["moe", "attention"])
def test_header_follows_the_op_yaml(op: str, tmp_path: Path) -> None:
    """Every name, bound and shape of the file is in the header, and a change of the file is one of the header."""
    copy = shutil.copytree(ROOT / "plugins", tmp_path / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "qwenforge", tmp_path / "qwenforge", ignore=shutil.ignore_patterns("__pycache__"))
    generator = Path(shutil.copytree(ROOT / "cmake", tmp_path / "cmake")) / "generate_spec_header.py"

    def header() -> str:
        subprocess.run([sys.executable, generator, op, tmp_path / "spec.h"], check=True, cwd=tmp_path)
        return (tmp_path / "spec.h").read_text(encoding="utf-8")

    before = header()
    path = copy / op / "op.yaml"
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"name: (\w+)", text):
        assert f'"{name}"' in before
    changed = re.sub(r"maximum: 256", "maximum: 255", text, count=1)
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    assert header() != before and "255" in header()
