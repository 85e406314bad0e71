"""Finding libqwenforge_plugins.so and handing it to TensorRT's plugin registry."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenforge import __version__, op_spec
from qwenforge.errors import UserError

LIBRARY = "libqwenforge_plugins.so"
VARIABLE = "QWENFORGE_PLUGIN_LIBRARY"
_SOURCES = Path(__file__).resolve().parents[2]
_PLACES = (
    _SOURCES / "plugins" / "lib" / LIBRARY,
    _SOURCES / "build" / "plugins" / "plugins" / LIBRARY,
)
_HOW = f"build it with 'make plugins' in qwenforge's sources and give its path with --plugin-library or {VARIABLE}"


@dataclass(frozen=True)
class PluginLibrary:
    """A library that loads, and the version it says it has."""

    path: Path
    version: str


def find_plugin_library(given: Path | None) -> PluginLibrary:
    """The library at ``given``, or where the environment, the installation or a build in the sources has it.

    Raises:
        UserError: there is none, it does not load, it is not ours or it is of another version.
    """
    path = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if path is None:
        path = next((place for place in _PLACES if place.is_file()), None)
    if path is None:
        raise UserError(f"the bundle needs the plugin library {LIBRARY}, which was not found: {_HOW}.")
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"there is no plugin library at {path}: {_HOW}.")
    try:
        library = ctypes.CDLL(str(path))
        function = library.qwenforgePluginsVersion
    except OSError as error:
        raise UserError(f"the plugin library {path} does not load ({error}): {_HOW}.") from error
    except AttributeError as error:
        raise UserError(f"{path} is not qwenforge's plugin library: {_HOW}.") from error
    function.restype = ctypes.c_char_p
    version = function().decode()
    if version != __version__:
        raise UserError(
            f"the plugin library {path} is of version {version} and this is qwenforge {__version__}: {_HOW}."
        )
    return PluginLibrary(path, version)


def register(module: Any, library: PluginLibrary) -> None:
    """Load ``library`` into the registry of ``module``, once a process.

    Raises:
        UserError: TensorRT refuses it.
    """
    registry = module.get_plugin_registry()
    wanted = {op_spec.load(plugin).name for plugin in op_spec.PLUGINS}

    def known() -> set[str]:
        return {creator.name for creator in registry.all_creators if creator.plugin_namespace == op_spec.NAMESPACE}

    if wanted <= known():
        return
    registry.load_library(str(library.path))
    if missing := wanted - known():
        raise UserError(
            f"TensorRT {module.__version__} does not take the plugin {min(missing)} from {library.path}: build the "
            "library again with 'make plugins'."
        )
