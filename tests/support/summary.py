"""Tables that tests leave behind, printed when the run is over (tests/conftest.py)."""

from __future__ import annotations

TABLES: dict[str, list[str]] = {}
"""Rows by title, in the order in which they came."""
