"""Finding one of our own shared libraries, and making sure that it is one of ours and of this version."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenforge import __version__
from qwenforge.errors import UserError

_SOURCES = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class NativeLibrary:
    """A library that loads, and the version it says it has."""

    path: Path
    version: str


def build_places(file_name: str) -> tuple[Path, ...]:
    """Where an installation has the library, and where ``make plugins`` puts it in the sources."""
    return (_SOURCES / "plugins" / "lib" / file_name, _SOURCES / "build" / "plugins" / "plugins" / file_name)


def locate_library(given: Path | None, *, variable: str, places: Sequence[Path]) -> Path | None:
    """``given``, or what the environment ``variable`` says, or the first of ``places`` where there is a file."""
    path = given or (Path(os.environ[variable]) if os.environ.get(variable) else None)
    return path or next((place for place in places if place.is_file()), None)


def find_library(file_name: str, given: Path | None, *, variable: str, places: Sequence[Path]) -> NativeLibrary:
    """The library at ``given``, or where the environment ``variable`` or one of ``places`` has it.

    Raises:
        UserError: there is none, it does not load, it is not ours or it is of another version.
    """
    how = f"build it with 'make plugins' in qwenforge's sources and give its path with --plugin-library or {variable}"
    path = locate_library(given, variable=variable, places=places)
    if path is None:
        raise UserError(f"the bundle needs the plugin library {file_name}, which was not found: {how}.")
    return open_library(path, how)


def open_library(path: Path, how: str) -> NativeLibrary:
    """The library at ``path``; ``how`` ends the sentence where it cannot be used: what to do.

    Raises:
        UserError: it is not there, it does not load, it is not ours or it is of another version.
    """
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"there is no plugin library at {path}: {how}.")
    try:
        library = ctypes.CDLL(str(path))
        function = library.qwenforgePluginsVersion
    except OSError as error:
        raise UserError(f"the plugin library {path} does not load ({error}): {how}.") from error
    except AttributeError as error:
        raise UserError(f"{path} is not qwenforge's plugin library: {how}.") from error
    function.restype = ctypes.c_char_p
    version = function().decode()
    if version != __version__:
        raise UserError(
            f"the plugin library {path} is of version {version} and this is qwenforge {__version__}: {how}."
        )
    return NativeLibrary(path, version)
