"""Finding libqwenforge_cpu.so: where it may be, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from qwenforge import __version__, names
from qwenforge.engine import cpu_library as module
from qwenforge.engine.cpu_library import INSTRUCTION_SET_VARIABLE, VARIABLE, cpu_library, find_cpu_library, library_of
from qwenforge.engine.ort_library import find_ort_library
from qwenforge.errors import UserError

_SYMBOLS = {
    "version": 'const char* qwenforgePluginsVersion(void) { return "%s"; }',
    "ops": "void* RegisterCustomOps(void) { return 0; }",
    "cpu": 'const char* qwenforgeCpuInstructionSet(void) { return "avx2"; }',
}


def made(folder: Path, *symbols: str, version: str = __version__) -> Path:
    """A library with only ``symbols``, named as in ``_SYMBOLS``."""
    source = "\n".join(_SYMBOLS[name] % version if name == "version" else _SYMBOLS[name] for name in symbols)
    path = folder / "lib.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=source, text=True, check=True)
    return path


@pytest.fixture(name="nowhere")
def _nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the library."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(module, "_PLACES", ())


def test_installed_library_is_of_this_version_and_names_its_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    found = cpu_library()
    assert found is not None and found == find_cpu_library()
    assert found.version == __version__
    assert found.instruction_set in ("avx512-vnni", "avx2", "baseline")


@pytest.mark.usefixtures("nowhere")
def test_installation_without_a_compiler_has_none_and_says_why() -> None:
    assert cpu_library() is None
    with pytest.raises(
        UserError, match=r"bundle was exported with qwenforge's CPU kernels.*no C\+\+ compiler"
    ) as error:
        find_cpu_library()
    assert "--kernels onnxruntime" in str(error.value)
    with pytest.raises(UserError, match=r"^--kernels qwenforge asks"):
        find_cpu_library(wanted_by="--kernels qwenforge asks for qwenforge's CPU kernels")


@pytest.mark.usefixtures("nowhere")
def test_environment_and_argument_give_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = made(tmp_path, "version", "ops", "cpu")
    assert find_cpu_library(path).path == path
    monkeypatch.setenv(VARIABLE, str(path))
    found = cpu_library()
    assert found is not None and (found.path, found.instruction_set) == (path, "avx2")


def test_path_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plugin library at"):
        find_cpu_library(tmp_path / "absent.so")


@pytest.mark.parametrize(
    ("symbols", "version", "message"),
    [
        (("ops", "cpu"), __version__, "not qwenforge's plugin library"),
        (("version", "ops", "cpu"), "0.0.1", "is of version 0.0.1 and this is qwenforge"),
        (("version",), __version__, "registers no custom ops.*give the path of libqwenforge_cpu.so"),
        (("version", "ops"), __version__, "ops for CUDA and not for CPUs.*libqwenforge_cpu.so"),
    ],
)
def test_another_library_is_refused(tmp_path: Path, symbols: tuple[str, ...], version: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_cpu_library(made(tmp_path, *symbols, version=version))


def test_cpu_library_is_refused_where_the_one_for_cuda_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ops for CPUs and not for CUDA.*libqwenforge_ort.so"):
        find_ort_library(made(tmp_path, "version", "ops", "cpu"))


@pytest.mark.parametrize(("asked", "found"), [("baseline", "baseline"), ("neon", None)])
def test_environment_asks_for_a_lesser_instruction_set(asked: str, found: str | None) -> None:
    # The library reads the variable once in the life of a process.
    script = "from qwenforge.engine.cpu_library import cpu_library; print(cpu_library().instruction_set)"
    finished = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={INSTRUCTION_SET_VARIABLE: asked},
    )
    if found is not None:
        assert finished.stdout.strip() == found, finished.stderr
    else:
        assert "QWENFORGE_CPU_ISA is 'neon'" in finished.stderr and "unset it" in finished.stderr


@pytest.mark.parametrize("domain", ["", names.CPU_DOMAIN])
def test_session_needs_the_library_for_nodes_of_its_domain_only(domain: str) -> None:
    value = ir.Value(name="x")
    node = ir.Node(domain, "Identity", [value])
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node]), ir_version=10)
    assert library_of(model) == (find_cpu_library().path if domain else None)
