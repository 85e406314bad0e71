"""The wheel: pure Python, complete, and importable without the source tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwenforge.engine.planning.known_models import KNOWN_MODELS
from support.source_tree import ROOT, STAGES, module_names, python_files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built once with the build backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    finished = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_holds_every_module(contents: set[str]) -> None:
    for name, path in python_files():
        file = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        assert file in contents


def test_wheel_is_marked_as_typed(contents: set[str]) -> None:
    assert "qwenforge/py.typed" in contents


def test_wheel_holds_no_native_source_and_no_tool_settings(contents: set[str]) -> None:
    packaged = {name for name in contents if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in packaged} == {"qwenforge"}
    assert {Path(name).suffix for name in packaged} <= {".py", ".typed", ".jinja", ".json", ".yaml", ".jsonl", ".txt"}


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
