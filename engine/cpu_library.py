"""Finding libqwenforge_cpu.so, our ops for ONNX Runtime's CPU provider, and the sessions that need it.

Installing qwenforge builds it and puts it beside the Python package, unless the machine has no C++ compiler.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenforge import names, plugins
from qwenforge.engine.native_library import NativeLibrary, locate_library, open_library
from qwenforge.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

LIBRARY = "libqwenforge_cpu.so"
VARIABLE = "QWENFORGE_CPU_LIBRARY"
INSTRUCTION_SET_VARIABLE = "QWENFORGE_CPU_ISA"
"""Read by the library: asks for a lesser instruction set than the processor's."""

_HOW = (
    "install a C++ compiler and reinstall qwenforge ('make cpu' in its sources, or pip install "
    f"--force-reinstall --no-deps), or give the path of the right one with --plugin-library or {VARIABLE}"
)
# An editable install has the sources and, elsewhere, what it built of them.
_PLACES = (
    *(Path(folder) / "lib" / LIBRARY for folder in plugins.__path__),
    Path(__file__).resolve().parents[1] / "build" / "cpu" / LIBRARY,
)


@dataclass(frozen=True)
class CpuLibrary(NativeLibrary):
    """The library, and the instruction set that its kernels use: ``avx512-vnni``, ``avx2`` or ``baseline``."""

    instruction_set: str


def find_cpu_library(
    given: Path | None = None, *, wanted_by: str = "the bundle was exported with qwenforge's CPU kernels"
) -> CpuLibrary:
    """The library at ``given``, or where the environment, the installation or a build in the sources has it.

    Args:
        given: its path; None to look for it.
        wanted_by: how the sentence begins that says there is none.

    Raises:
        UserError: there is none, it does not load, it is not this one of ours, it is of another version, or the
            environment asks for an instruction set that it cannot use.
    """
    path = locate_library(given, variable=VARIABLE, places=_PLACES)
    if path is None:
        raise UserError(
            f"{wanted_by}, and this installation was made without them ({LIBRARY} was not built: there was no C++ "
            "compiler then): reinstall qwenforge where there is one, or export again with --kernels onnxruntime."
        )
    return _opened(path)


def cpu_library() -> CpuLibrary | None:
    """The library that this installation has; None where it was made without.

    Raises:
        UserError: there is one that cannot be used (see :func:`find_cpu_library`).
    """
    path = locate_library(None, variable=VARIABLE, places=_PLACES)
    return None if path is None else _opened(path)


def library_of(model: ir.Model) -> Path | None:
    """The library that a session of ``model`` has to register; None where no node of it needs one.

    Raises:
        UserError: it is needed and not to be had.
    """
    if any(node.domain == names.CPU_DOMAIN for node in model.graph.all_nodes()):
        return find_cpu_library().path
    return None


def _opened(path: Path) -> CpuLibrary:
    found = open_library(path, _HOW)
    library = ctypes.CDLL(str(found.path))
    if not hasattr(library, "RegisterCustomOps"):
        raise UserError(f"{found.path} registers no custom ops with ONNX Runtime; give the path of {LIBRARY}.")
    if not hasattr(library, "qwenforgeCpuInstructionSet"):
        raise UserError(f"{found.path} has qwenforge's ops for CUDA and not for CPUs; give the path of {LIBRARY}.")
    function = library.qwenforgeCpuInstructionSet
    function.restype = ctypes.c_char_p
    instruction_set: bytes | None = function()
    if instruction_set is None:
        raise UserError(
            f"{INSTRUCTION_SET_VARIABLE} is {os.environ.get(INSTRUCTION_SET_VARIABLE)!r}: an instruction set that this "
            "processor does not have, or none of baseline, avx2 and avx512; unset it."
        )
    return CpuLibrary(found.path, found.version, instruction_set.decode())
