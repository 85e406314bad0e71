"""Give freed memory back to the system.

glibc keeps freed blocks of up to 32 MB for later use. Weights of one layer after another, of changing sizes, then hold
several times what is in use.
"""

from __future__ import annotations

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Return free heap pages to the system; does nothing where the C library is not glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
