"""A snapshot of what users program against: changing it is a decision, recorded here and in CHANGELOG.md."""

from __future__ import annotations

import inspect

import pytest

import qwenforge

EXPORT_PARAMETERS = (
    "checkpoint",
    "output",
    "target",
    "dtype",
    "weights",
    "max_length",
    "max_batch",
    "verify_result",
    "verify_passes",
    "choice",
    "dequantize",
    "quantization",
    "static_scales",
    "kernels",
    "cache",
    "progress",
)


def test_public_names_are_the_snapshot() -> None:
    assert qwenforge.__all__ == ["__version__", "export", "load"]
    assert set(qwenforge.__all__) <= set(dir(qwenforge))


def test_export_takes_the_snapshot_parameters() -> None:
    assert tuple(inspect.signature(qwenforge.export).parameters) == EXPORT_PARAMETERS


def test_load_takes_a_bundle_path_first() -> None:
    parameters = list(inspect.signature(qwenforge.load).parameters.values())
    assert parameters[0].name == "path"
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters[1:])


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="train"):
        _ = qwenforge.train
