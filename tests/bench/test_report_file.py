"""A report of figures is refused before the work or written whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenforge.bench.report_file import check_report_file, write_report
from qwenforge.errors import UserError


def test_report_replaces_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("older")
    check_report_file(file)
    write_report(file, {"figure": 1.5})
    assert json.loads(file.read_text()) == {"figure": 1.5}
    assert list(tmp_path.iterdir()) == [file]


def test_report_that_is_no_json_leaves_the_older_one(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("older")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(file, {"figure": float("nan")})
    assert file.read_text() == "older" and list(tmp_path.iterdir()) == [file]


def test_report_that_cannot_take_its_place_leaves_no_partial_file(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report.json \(.*\): choose another file"):
        write_report(file, {})
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("name", "reason"), [(".", "is a folder"), ("no/report.json", "does not exist")])
def test_place_that_cannot_hold_a_report_is_refused_beforehand(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_report_file(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
