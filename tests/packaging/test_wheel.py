"""The wheel: complete, with the CPU kernels where there is a C++ compiler, and importable without the source tree."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import qwenforge
from qwenforge.engine.planning.known_models import KNOWN_MODELS
from support.source_tree import ROOT, STAGES, module_names, python_files

CPU_LIBRARY = "qwenforge/plugins/lib/libqwenforge_cpu.so"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built once with the build backend and the compiler that are installed here."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel where there is no C++ compiler."""
    return build_wheel(tmp_path_factory.mktemp("pure"), {**os.environ, "CXX": "/nonexistent/c++"})


def build_wheel(folder: Path, environment: Mapping[str, str] | None = None) -> Path:
    """The wheel, in ``folder``; compiled in a folder of its own, which knows no compiler from an earlier build."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--config-settings", f"build-dir={folder / 'build'}", "--wheel-dir", str(folder), str(ROOT)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_with_a_compiler_is_for_this_platform_and_any_python(wheel: Path) -> None:
    tag = wheel.stem.split("-", 2)[2]
    assert tag.startswith("py3-none-linux_")


def test_wheel_with_a_compiler_holds_the_cpu_library_of_its_version(
    wheel: Path, contents: set[str], tmp_path: Path
) -> None:
    assert [name for name in contents if name.endswith(".so")] == [CPU_LIBRARY]
    with zipfile.ZipFile(wheel) as archive:
        library = ctypes.CDLL(archive.extract(CPU_LIBRARY, tmp_path))
    library.qwenforgePluginsVersion.restype = ctypes.c_char_p
    assert library.qwenforgePluginsVersion().decode() == qwenforge.__version__


def test_wheel_without_a_compiler_is_pure_python_with_the_same_modules(pure_wheel: Path, contents: set[str]) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure_wheel) as archive:
        assert set(archive.namelist()) == contents - {CPU_LIBRARY}


def test_source_distribution_holds_what_the_cpu_library_is_made_of(tmp_path: Path) -> None:
    script = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "plugins" / "cpu").iterdir() if path.is_file()}
    assert sources | {"VERSION", "plugins/onnxruntime/ort.h", "plugins/onnxruntime/ort_abi.h"} <= packed


def test_wheel_holds_every_module(contents: set[str]) -> None:
    for name, path in python_files():
        file = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        assert file in contents


def test_wheel_is_marked_as_typed(contents: set[str]) -> None:
    assert "qwenforge/py.typed" in contents


def test_wheel_holds_no_native_source_and_no_tool_settings(contents: set[str]) -> None:
    packaged = {name for name in contents if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in packaged} == {"qwenforge"}
    kinds = {".py", ".typed", ".jinja", ".json", ".yaml", ".jsonl", ".txt", ".so"}
    assert {Path(name).suffix for name in packaged} <= kinds


def test_wheel_holds_the_configurations_of_known_models(contents: set[str]) -> None:
    packaged = {Path(name).stem for name in contents if Path(name).suffix == ".json"}
    assert packaged == set(KNOWN_MODELS)


def test_wheel_holds_the_calibration_sample_and_its_licence(contents: set[str]) -> None:
    packaged = {name for name in contents if name.endswith((".jsonl", ".txt")) and ".dist-info/" not in name}
    assert {"qwenforge/calibration/sample.jsonl", "qwenforge/calibration/sample.LICENSE.txt"} <= packaged


def test_wheel_holds_the_licence(contents: set[str]) -> None:
    assert any(name.endswith("/LICENSE") for name in contents)


def test_every_module_of_the_wheel_imports_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import sys\nfrom importlib import import_module\n"
        # An editable install answers before sys.path is searched.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        f"for name in {module_names()}:\n"
        f"    assert import_module(name).__file__.startswith({str(tmp_path)!r}), name\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr


def test_every_stage_folder_is_mapped(contents: set[str]) -> None:
    for stage in STAGES:
        assert f"qwenforge/{stage}/__init__.py" in contents
