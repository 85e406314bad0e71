"""The report of an export that missed its budget, beside the output: written by the refusal, gone with a success.

``OUTPUT.accuracy.html`` and ``OUTPUT.accuracy.json`` appear whole or not at all. A file of that name that is no report
of ours is never replaced nor deleted.
"""

from __future__ import annotations

import json
from pathlib import Path

from qwenforge.engine.accuracy_page import PAGE_MARK, accuracy_page
from qwenforge.engine.accuracy_report import QuantizationOutcome
from qwenforge.errors import AccuracyError, UserError
from qwenforge.text_file import replace_text

_REPORT_KEYS = {"version", "recipe", "held_out", "budget", "missed"}


def require_place_for_report(output: Path) -> None:
    """Refuse an output beside which a report could not be written, before any work is done.

    Raises:
        UserError: something that is no report has its name.
    """
    for path in _paths(output):
        if path.exists() and not _is_report(path):
            raise UserError(
                f"{path} is in the way of the report that a missed budget writes there, and is none; move it away or "
                "choose another path for the bundle."
            )


def refuse_beyond_budget(outcome: QuantizationOutcome, output: Path) -> None:
    """Raise AccuracyError when ``outcome`` misses its budget, its report written beside ``output``.

    It replaces that of an earlier export.
    """
    if not outcome.missed:
        return
    page, figures = _paths(output)
    text = json.dumps(outcome.to_json(), indent=1, allow_nan=False) + "\n"
    for path, content in ((figures, text), (page, accuracy_page(outcome))):
        replace_text(path, content, advice="; choose another path for the bundle")
    raise AccuracyError(outcome.refusal(str(page)))


def withdraw_refusal(output: Path) -> None:
    """Delete what an earlier refusal said of ``output``, which now is a bundle.

    Raises:
        UserError: it cannot be deleted.
    """
    for path in _paths(output):
        if not _is_report(path):
            continue
        try:
            path.unlink()
        except OSError as error:
            raise UserError(
                f"the bundle {output} is written, but the report {path} of an earlier refusal cannot be deleted "
                f"({error.strerror}); delete it yourself."
            ) from error


def _paths(output: Path) -> tuple[Path, Path]:
    """The page's and the figures'."""
    return output.with_name(f"{output.name}.accuracy.html"), output.with_name(f"{output.name}.accuracy.json")


def _is_report(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    if path.suffix == ".html":
        return PAGE_MARK in text
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() >= _REPORT_KEYS
