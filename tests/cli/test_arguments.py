"""Arguments that verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from qwenforge.cli import arguments


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    arguments.add_bundle(parser)
    arguments.add_target(parser, default="ort-cpu")
    arguments.add_dtype(parser)
    arguments.add_threads(parser)
    arguments.add_json(parser)
    return parser


def test_defaults_leave_choices_to_the_target(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["folder"])
    assert vars(args) == {
        "bundle": Path("folder"),
        "target": "ort-cpu",
        "dtype": None,
        "threads": None,
        "json": False,
    }


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_threads_below_one_or_no_integer_are_refused(
    parser: argparse.ArgumentParser, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        parser.parse_args(["folder", "--threads", value])
    assert leaving.value.code == 2
    assert "--threads" in capsys.readouterr().err


def test_dtype_is_taken_as_written_for_the_target_to_judge(parser: argparse.ArgumentParser) -> None:
    assert parser.parse_args(["folder", "--dtype", "fp8"]).dtype == "fp8"
