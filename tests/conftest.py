"""Prints the tables that tests collected, in whichever process they ran."""

from __future__ import annotations

from typing import Any

import pytest

from support.summary import TABLES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the tables of a worker of pytest-xdist."""
    TABLES.update(getattr(node, "workeroutput", {}).get("tables", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tables"] = TABLES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, rows in TABLES.items():
        terminalreporter.section(title)
        for row in rows:
            terminalreporter.write_line(row)
