"""tests/gpu as modules: its files are scripts, run where nothing of the project is installed."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from support.source_tree import ROOT

FOLDER = ROOT / "tests" / "gpu"


@functools.cache
def summary() -> Any:
    """tests/gpu/summary.py."""
    spec = importlib.util.spec_from_file_location("gpu_summary", FOLDER / "summary.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
