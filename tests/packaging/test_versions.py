"""One version number, in every place that states it."""

from __future__ import annotations

import re
from importlib import metadata

import qwenforge
from support.source_tree import ROOT


def test_version_file_package_and_changelog_agree() -> None:
    version = (ROOT / "VERSION").read_text().strip()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
    assert metadata.version("qwenforge") == version
    assert qwenforge.__version__ == version
