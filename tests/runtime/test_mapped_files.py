"""Pages of a bundle's data file count as memory only while they are needed."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from qwenforge.runtime import mapped_files

BYTES = 8 << 20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings are listed by Linux's /proc")


def _resident(path: Path) -> int:
    """KiB of the mappings of ``path`` that are in memory."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.partition(" ")[0].endswith(":"):
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def _mapped(path: Path, access: int = mmap.ACCESS_READ) -> mmap.mmap:
    path.write_bytes(np.arange(BYTES // 4, dtype=np.int32).tobytes())
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def test_pages_that_were_read_are_given_back_and_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx.data"
    with _mapped(path) as mapped:
        content = mapped[:]
        assert _resident(path) == BYTES >> 10
        assert mapped_files.give_back(tmp_path) == BYTES
        assert _resident(path) == 0
        assert mapped[:] == content


def test_pages_that_were_written_stay(tmp_path: Path) -> None:
    with _mapped(tmp_path / "model.onnx.data", mmap.ACCESS_COPY) as mapped:
        mapped[0:4] = b"\xff\xff\xff\xff"
        assert mapped_files.give_back(tmp_path) == 0
        assert mapped[0:4] == b"\xff\xff\xff\xff"


def test_files_elsewhere_are_left_alone(tmp_path: Path) -> None:
    inner = tmp_path / "other"
    inner.mkdir()
    path = inner / "weights.bin"
    with _mapped(path) as mapped:
        assert any(mapped[:])
        assert mapped_files.give_back(tmp_path) == 0
        assert _resident(path) == BYTES >> 10
