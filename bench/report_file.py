"""Writing a report of figures to a file: refused before anything is measured, and never half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qwenforge.errors import UserError
from qwenforge.text_file import replace_text


def check_report_file(path: Path) -> None:
    """Raise UserError unless a report can be written to ``path``: minutes of measuring must not be lost for that."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the JSON file to write, such as {path / 'report.json'}.")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist: create it first.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"the folder {path.parent} is not writable: choose another file for the report.")


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write ``report`` as JSON to ``path``, replacing what was there in one step; raises UserError when it cannot."""
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    replace_text(path, text, advice=": choose another file for the report.")
