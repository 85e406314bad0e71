"""Writing a small text file in one step, so that whoever looks finds the old text whole or the new text whole."""

from __future__ import annotations

from pathlib import Path

from qwenforge.errors import UserError


def replace_text(path: Path, text: str, *, advice: str) -> None:
    """Write ``text`` in UTF-8 to ``path``, replacing what was there in one step.

    Raises:
        UserError: it cannot be written; the sentence ends in ``advice``, its punctuation included.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}){advice}") from error
