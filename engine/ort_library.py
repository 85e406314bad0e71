"""Finding libqwenforge_ort.so, our custom ops for ONNX Runtime's CUDA execution provider."""

from __future__ import annotations

import ctypes
from pathlib import Path

from qwenforge.engine.native_library import NativeLibrary, build_places, find_library
from qwenforge.errors import UserError

LIBRARY = "libqwenforge_ort.so"
VARIABLE = "QWENFORGE_ORT_LIBRARY"
_PLACES = build_places(LIBRARY)


def find_ort_library(given: Path | None) -> NativeLibrary:
    """The library at ``given``, or where the environment, the installation or a build in the sources has it.

    Raises:
        UserError: there is none, it does not load, it is not this one of ours, or it is of another version.
    """
    found = find_library(LIBRARY, given, variable=VARIABLE, places=_PLACES)
    library = ctypes.CDLL(str(found.path))
    if hasattr(library, "qwenforgeCpuInstructionSet"):
        raise UserError(f"{found.path} has qwenforge's ops for CPUs and not for CUDA; give the path of {LIBRARY}.")
    if not hasattr(library, "RegisterCustomOps"):
        raise UserError(f"{found.path} registers no custom ops with ONNX Runtime; give the path of {LIBRARY}.")
    return found
