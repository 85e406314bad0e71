"""Finding libqwenforge_plugins.so and handing it to TensorRT's plugin registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenforge import op_spec
from qwenforge.engine.native_library import NativeLibrary, build_places, find_library
from qwenforge.errors import UserError

LIBRARY = "libqwenforge_plugins.so"
VARIABLE = "QWENFORGE_PLUGIN_LIBRARY"
_PLACES = build_places(LIBRARY)


def find_plugin_library(given: Path | None) -> NativeLibrary:
    """The library at ``given``, or where the environment, the installation or a build in the sources has it.

    Raises:
        UserError: there is none, it does not load, it is not ours or it is of another version.
    """
    return find_library(LIBRARY, given, variable=VARIABLE, places=_PLACES)


def register(module: Any, library: NativeLibrary) -> None:
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
