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
    """A CUDA toolkit: bin/nvcc, include, lib; that of PyPI's wheels, else the machine's own, None without either."""
    found = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))
    own = shutil.which("nvcc")
    nvcc = found[-1] if found else Path(own).resolve() if own is not None else None
    return nvcc.parent.parent if nvcc is not None else None


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
            finished = cmake(*step)
            if finished.returncode:
                raise RuntimeError(f"cmake {' '.join(step)} failed:\n{finished.stdout}\n{finished.stderr}")
    return FOLDER / "plugins" / NAME


def cmake(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run cmake in the project's folder, with this Python's tools and compiler."""
    environment = {**os.environ, "PATH": _path()}
    command = ["cmake", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)


def _path() -> str:
    """PATH with the tools of this Python's environment first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
