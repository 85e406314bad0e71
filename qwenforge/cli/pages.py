"""The HTML pages that verbs write besides what they print."""

from __future__ import annotations

from pathlib import Path

from qwenforge.errors import UserError


def write_page(path: Path, page: str) -> None:
    """Write ``page`` to ``path``, replacing what was there in one step; raises UserError when it cannot."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}); give --html a file in a writable folder") from error
