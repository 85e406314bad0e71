"""Prints the tables that tests collected."""

from __future__ import annotations

import pytest

from support.summary import TABLES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, rows in TABLES.items():
        terminalreporter.section(title)
        for row in rows:
            terminalreporter.write_line(row)
