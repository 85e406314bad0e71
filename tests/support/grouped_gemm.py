"""The grouped GEMM from Python: its setup kernel in the emulator, and the objects of the built library."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from support.plugin_library import FOLDER, cuda_folder, plugin_library
from support.source_tree import ROOT

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
_CHECKED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def why_missing() -> str:
    """Why the library is built without CUTLASS here; empty when it is built with it."""
    if find_spec("cutlass_library") is None:
        return "CUTLASS is not installed: pip install --no-deps -r tests/requirements.txt"
    return ""


def objects() -> list[Path]:
    """The objects of moe/cutlass in the built library, ``NAME.o`` with ptxas's words in ``NAME.o.log``.

    Raises:
        RuntimeError: the library does not build.
    """
    plugin_library()
    return sorted((FOLDER / "plugins" / "CMakeFiles" / "qwenforge_grouped_gemm.dir").rglob("*.o"))


def described(schedule: int, numbers: Sequence[int], counts: Sequence[int]) -> bytes:
    """The workspace, 0xff before, after describeGroups.

    Args:
        numbers: rows, depth, and the addresses of inputs, weights and outputs.
    """
    command = [_setup_driver(), schedule, *numbers, *counts]
    return subprocess.run([str(part) for part in command], capture_output=True, check=True, timeout=60).stdout


def call(driver: Path, *arguments: object, data: bytes = b"") -> bytes:
    """What ``grouped_gemm_driver.cpp`` prints for the arguments that it explains.

    Raises:
        subprocess.CalledProcessError: it says why on stderr.
    """
    command = [str(driver), *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, check=True, timeout=120).stdout


@functools.cache
def library_driver() -> Path:
    """The driver, linked to the library's objects."""
    return _link("with", objects())


@functools.cache
def missing_driver() -> Path:
    """The driver, linked to what the library has in their place when it is built without CUTLASS."""
    return _link("without", [ROOT / "plugins" / "moe" / "cutlass" / "grouped_missing.cpp"])


@functools.cache
def recording_driver() -> Path:
    """The driver, linked to the library's objects and to a runtime that says what is asked of it."""
    sources = [_HERE / "grouped_gemm_driver.cpp", _HERE / "recording_runtime.cpp", *objects()]
    return _compile("recording", sources, ["-no-pie", "-Wl,--unresolved-symbols=ignore-in-object-files"])


def _link(name: str, parts: Sequence[Path]) -> Path:
    cuda = cuda_folder()
    assert cuda is not None
    libraries = [f"-L{folder}" for folder in (cuda / "lib", cuda / "lib64") if folder.is_dir()]
    libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return _compile(name, [_HERE / "grouped_gemm_driver.cpp", *parts], libraries)


@functools.cache
def _setup_driver() -> Path:
    source = _HERE / "simt" / "grouped_setup_driver.cpp"
    return _compile("setup", [source], ["-DQWENFORGE_SIMT", f"-I{_HERE / 'simt'}", *_CHECKED])


def _compile(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """A program in a folder of this process's own."""
    cuda = cuda_folder()
    assert cuda is not None
    program = Path(_folder().name) / name
    includes = [f"-I{ROOT / 'plugins'}", "-isystem", str(cuda / "include")]
    command = ["g++", *_FLAGS, *includes, *map(str, sources), *flags, "-o", str(program)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{name} does not compile: {finished.stderr[:4000]}")
    return program


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()
