"""The HTML pages that verbs write besides what they print."""

from __future__ import annotations

from pathlib import Path

from qwenforge.text_file import replace_text


def write_page(path: Path, page: str) -> None:
    """Write ``page`` to ``path``, replacing what was there in one step; raises UserError when it cannot."""
    replace_text(path, page, advice="; give --html a file in a writable folder")
