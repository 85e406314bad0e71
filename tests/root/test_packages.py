"""Reading requirements and judging installed libraries."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from qwenforge import packages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("numpy>=1.26", ("numpy", "1.26", "")),
        ("rich", ("rich", "", "")),
        ("torch>=2.9; extra == 'export'", ("torch", "2.9", "export")),
        ("onnxruntime-gpu[cuda,cudnn]>=1.31; extra == 'cuda'", ("onnxruntime-gpu", "1.31", "cuda")),
        ('ruff==0.17.*; extra == "dev"', ("ruff", "", "dev")),
        ('onnx-ir >= 1.0 ; python_version >= "3.10"', ("onnx-ir", "1.0", "")),
    ],
)
def test_requirement_is_taken_apart(text: str, expected: tuple[str, str, str]) -> None:
    assert packages.parse_requirement(text) == expected


def test_unreadable_requirement_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot read the requirement"):
        packages.parse_requirement("; nothing")


def test_survey_covers_runtime_and_export_but_not_development() -> None:
    names = {package.name for package in packages.survey()}
    assert {"numpy", "onnxruntime", "torch", "transformers"} <= names
    assert not names & {"pytest", "ruff", "mypy"}


def test_absent_package_is_not_usable() -> None:
    package = packages.inspect_package("qwenforge-no-such-library", "1.0", "")
    assert not package.usable
    assert package.problem == "not installed"


def test_old_package_is_not_usable() -> None:
    package = packages.inspect_package("numpy", "999.0", "")
    assert not package.usable
    assert package.problem.endswith("is older than 999.0")


def test_newer_release_with_local_tag_is_usable() -> None:
    assert packages.inspect_package("pytest", "8", "dev").usable


def test_package_that_does_not_import_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    package = packages.inspect_package("pytest", "8", "dev")
    assert package.version
    assert package.problem.startswith("does not import")


def test_gpu_build_of_onnxruntime_stands_in_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are two distributions of one module; only one of them should be installed."""

    def version(name: str) -> str:
        if name == "onnxruntime-gpu":
            return "1.31.1"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "version", version)
    assert packages.installed_version("onnxruntime") == "1.31.1"
    assert packages.inspect_package("onnxruntime", "1.31", "").usable
    assert packages.installed_version("onnx") == ""
