"""The library of CPU kernels that was built when qwenforge was installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenforge.engine.cpu_library import LIBRARY, cpu_library


@pytest.fixture(scope="session", name="cpu_library")
def _cpu_library() -> Path:
    """The path of libqwenforge_cpu.so, of this version."""
    found = cpu_library()
    if found is None:
        pytest.fail(f"qwenforge was installed without {LIBRARY}: install a C++ compiler, then 'make cpu'")
    return found.path
