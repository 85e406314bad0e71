"""libqwenforge_plugins.so, built once for all tests by the project's own CMake."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from support.source_tree import ROOT

FOLDER = ROOT / "build" / "test-plugins"
NAME = "libqwenforge_plugins.so"


def why_missing() -> str:
    """Why the library cannot be built here; empty when it can."""
    if cuda_folder() is None:
        return "no CUDA compiler is installed: pip install --no-deps -r tests/requirements.txt"
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool, path=_path()) is None:
            return f"{tool} is not installed"
    return ""


def cuda_folder() -> Path | None:
    """The toolkit that PyPI's wheels install: bin/nvcc, include, lib; None without them."""
    found = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))
    return found[-1].parent.parent if found else None


@functools.cache
def plugin_library() -> Path:
    """The library's path; ninja finds out what is left to do.

    Raises:
        RuntimeError: it does not build; the compiler's words are in the message.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for step in (["--preset", "plugins", "-B", str(FOLDER)], ["--build", str(FOLDER)]):
            environment = {**os.environ, "PATH": _path()}
            finished = subprocess.run(
                ["cmake", *step], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900
            )
            if finished.returncode:
                raise RuntimeError(f"cmake {' '.join(step)} failed:\n{finished.stdout}\n{finished.stderr}")
    return FOLDER / "plugins" / NAME


def _path() -> str:
    """PATH with the tools of this Python's environment first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
