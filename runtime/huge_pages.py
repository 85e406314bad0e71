"""Weights and caches in huge pages, where Linux gives them to who asks.

A step of one token reads every weight once, from memory that is far larger than what the processor's table of page
addresses covers. With pages of 4 KiB, looking addresses up then takes as long as the reading, on virtual machines even
more; with pages of 2 MiB it does not. Distributions let programs ask (``/sys/kernel/mm/transparent_hugepage/enabled``
says ``madvise``), and neither ONNX Runtime nor the C library does.

ONNX Runtime allocates its weights itself. So the memory that a session's creation added is found in
``/proc/self/maps`` and collapsed into huge pages afterwards: what lies in it does not change, and no address does.
Where anything of this is not there (another system, a kernel before 6.1, no free huge pages) memory is what it was.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIZE = 2 << 20
"""Bytes of a huge page on x86-64 and on Arm with base pages of 4 KiB; elsewhere the kernel declines."""

_MAPS = Path("/proc/self/maps")
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25

Region = tuple[int, int]
"""Addresses from the first to before the second."""


@contextmanager
def collapsing_new_memory() -> Iterator[None]:
    """Collapse what the block allocates, and keeps, into huge pages.

    Memory that other threads allocate meanwhile is collapsed with it, which does it no harm.
    """
    before = _anonymous_regions()
    yield
    if before:
        collapse(_added(_anonymous_regions(), before))


def collapse(regions: Iterable[Region]) -> int:
    """Put the whole huge pages of ``regions`` that are in use into huge pages; returns how many bytes are.

    One by one: the kernel stops at the first it cannot collapse, such as one nothing was written to.
    """
    madvise = madvise_function()
    if madvise is None:
        return 0
    collapsed = 0
    for start, end in map(_whole_pages, regions):
        if start < end and madvise(start, end - start, _MADV_HUGEPAGE) == 0:
            collapsed += sum(SIZE for page in range(start, end, SIZE) if madvise(page, SIZE, _MADV_COLLAPSE) == 0)
    return collapsed


def zeros(count: int) -> NDArray[np.uint8]:
    """``count`` zero bytes on a huge page's boundary; a huge page is committed when it is first written to."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or count == 0:
        return np.zeros(count, np.uint8)
    memory = mmap.mmap(-1, -(-count // SIZE) * SIZE + SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel that has no huge pages refuses the advice.
    if (madvise := madvise_function()) is not None:
        array = np.frombuffer(memory, np.uint8)
        offset = -array.ctypes.data % SIZE
        madvise(array.ctypes.data + offset, len(array) - SIZE, _MADV_HUGEPAGE)
        return array[offset : offset + count]
    return np.frombuffer(memory, np.uint8)[:count]


def _anonymous_regions() -> list[Region]:
    """Readable and writable private memory without a file behind it, in ascending order; empty without /proc."""
    if not _MAPS.is_file():
        return []
    found = []
    for line in _MAPS.read_text().splitlines():
        addresses, access, _, _, inode, *name = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, end = addresses.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def _added(after: Iterable[Region], before: Iterable[Region]) -> Iterator[Region]:
    """The parts of ``after`` that are in no region of ``before``; both ascend."""
    known = list(before)
    for start, end in after:
        for other_start, other_end in known:
            if other_end <= start or other_start >= end:
                continue
            if start < other_start:
                yield start, other_start
            start = other_end
        if start < end:
            yield start, end


def _whole_pages(region: Region) -> Region:
    return -(-region[0] // SIZE) * SIZE, region[1] // SIZE * SIZE


def madvise_function() -> ctypes._NamedFuncPointer | None:
    """C's ``madvise(address, bytes, advice)``; None where there is none like Linux's."""
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise.restype = ctypes.c_int
    return madvise
