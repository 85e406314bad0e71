"""Pages of a mapped file that were read once, given back.

ONNX Runtime maps a model's data file into memory, and an op that keeps its weights in an order of its own reads all of
it when a session is made. Those pages count as the process's memory until the system needs them elsewhere; given back,
they are read again, from the file or the system's cache of it, only where somebody looks at them: embeddings, say.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from qwenforge.runtime.huge_pages import madvise_function

_MAPS = Path("/proc/self/smaps")


def give_back(folder: Path) -> int:
    """Give back the pages of the mapped files directly in ``folder``; returns the number of mapped bytes.

    What nobody has written to, which is what the kernel is asked about, reads the same afterwards. Where there is no
    ``/proc`` nothing is done.
    """
    madvise = madvise_function()
    if madvise is None or not _MAPS.is_file():
        return 0
    given = 0
    for start, end in _unwritten(folder.resolve()):
        if madvise(start, end - start, mmap.MADV_DONTNEED) == 0:
            given += end - start
    return given


def _unwritten(folder: Path) -> list[tuple[int, int]]:
    """Addresses of the mappings of files in ``folder`` that hold no page of their own."""
    found = []
    region: tuple[int, int] | None = None
    for line in _MAPS.read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            addresses, *_, name = line.split(maxsplit=5) if line.count(" ") >= 5 else (key, "")
            region = None
            if Path(name).parent == folder:
                start, end = addresses.split("-")
                region = int(start, 16), int(end, 16)
        elif key == "Anonymous:" and region is not None and rest.split()[0] == "0":
            found.append(region)
    return found
