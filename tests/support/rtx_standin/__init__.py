"""TensorRT on a machine without a GPU: TensorRT for RTX behind the official Python bindings.

Two wheels from PyPI make it: ``onnxruntime-ep-nv-tensorrt-rtx-cu13`` carries TensorRT for RTX and its ONNX parser, and
``tensorrt-cu13-bindings`` is NVIDIA's Python module. Full TensorRT needs a GPU even to build; this does not. It lives
in a process of its own: :meth:`Standin.environment` makes ``import tensorrt`` and ``import tensorrt_rtx`` work there.

Only parsing an ONNX model and building an engine of it is safe, with plugin libraries, profiles, progress monitors and
timing caches. INetworkDefinition's virtual functions differ from ``add_plugin_v2`` on, so that most ``add_*`` functions
crash; engines can be neither loaded nor refitted without a GPU, and building stripped engines fails.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from support.source_tree import ROOT

Library = Literal["rtx", "lean"]
"""What stands behind the bindings: TensorRT for RTX, or TensorRT's lean runtime with the real plugin registry."""

WHEELS = {
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0",
    "tensorrt-cu13-bindings": "11.4.0.106",
    "tensorrt-lean-cu13-libs": "11.4.0.106",
}
"""The wheels and the versions that go together: a private interface connects the first two."""

RTX_VERSION = "1.7.1"
_SOURCE = Path(__file__).with_name("forwarding.c")
_FORWARDED = ("libnvinfer.so.11", "libnvonnxparser.so.11", "libnvinfer_plugin.so.11")
_RTX, _LEAN = f"libtensorrt_rtx.so.{RTX_VERSION}", "libnvinfer_lean.so.11"
_LINKS: dict[Library, dict[str, str]] = {
    "rtx": {
        "libtensorrt_rtx.so.1": _RTX,
        # Loading a plugin library makes the parser look for this name, and abort where it is not found.
        "libtensorrt_rtx.so": _RTX,
        "libtensorrt_onnxparser_rtx.so.1": f"libtensorrt_onnxparser_rtx.so.{RTX_VERSION}",
    },
    "lean": {_LEAN: _LEAN},
}
_MODULE = """\
\"\"\"NVIDIA's bindings under the name of the package that a user has installed.\"\"\"

from tensorrt_bindings import *  # noqa: F403

__version__ = "{version}"
"""


@dataclass(frozen=True)
class Standin:
    """The stand-in's folders: libraries, and Python packages ``tensorrt`` and ``tensorrt_rtx``."""

    libraries: Path
    packages: Path

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of a process that can import both packages, with ``changes`` to it."""
        result = dict(os.environ)
        for name, folder in (("LD_LIBRARY_PATH", self.libraries), ("PYTHONPATH", self.packages)):
            result[name] = os.pathsep.join(filter(None, (str(folder), result.get(name, ""))))
        # A GPU that happens to be here must not change what the tests see.
        return {**result, "CUDA_VISIBLE_DEVICES": "", **changes}

    def run(self, *arguments: str | Path, timeout: float = 240, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run ``python ARGUMENTS`` in that environment to its end."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def why_missing() -> str:
    """Why the stand-in cannot be used here; empty when it can."""
    if not sys.platform.startswith("linux") or sysconfig.get_platform() != "linux-x86_64":
        return f"TensorRT for RTX can be installed on Linux x86_64, not on {sysconfig.get_platform()}"
    for wheel, version in WHEELS.items():
        try:
            found = metadata.version(wheel)
        except metadata.PackageNotFoundError:
            return f"{wheel} is not installed; run pip install {wheel}=={version}"
        if found != version:
            return f"{wheel} is {found} here, and the stand-in is made for {version}"
    if _compiler() is None:
        return "no C compiler (cc) is installed"
    return ""


@functools.cache
def standin(library: Library = "rtx") -> Standin:
    """The stand-in, made in build/rtx-standin unless it is there; RuntimeError where :func:`why_missing` says why."""
    if reason := why_missing():
        raise RuntimeError(reason)
    wheels = _wheel_folder(library)
    made_of = _SOURCE.read_bytes() + Path(__file__).read_bytes() + f"{library} {wheels}".encode()
    folder = ROOT / "build" / "rtx-standin" / hashlib.sha256(made_of).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = folder.with_name(f"partial-{os.getpid()}")
            shutil.rmtree(partial, ignore_errors=True)
            _make(partial, library, wheels)
            partial.rename(folder)
    return Standin(folder / "lib", folder / "python")


def _make(folder: Path, library: Library, wheels: Path) -> None:
    libraries = folder / "lib"
    libraries.mkdir(parents=True)
    for name in _FORWARDED:
        # The plain command line that any gcc or clang takes; three sonames, one source.
        subprocess.run(
            [str(_compiler()), "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
            + [f'-DTENSORRT="{_LEAN}"' if library == "lean" else "-UTENSORRT"]
            + ["-o", str(libraries / name), str(_SOURCE), "-ldl"],
            check=True,
        )
    for link, name in _LINKS[library].items():
        (libraries / link).symlink_to(wheels / name)
    versions = {"tensorrt": WHEELS["tensorrt-cu13-bindings"], "tensorrt_rtx": RTX_VERSION}
    for package, version in versions.items():
        path = folder / "python" / package / "__init__.py"
        path.parent.mkdir(parents=True)
        path.write_text(_MODULE.format(version=version), encoding="utf-8")


def _wheel_folder(library: Library) -> Path:
    """The folder of the wheel's libraries; found without importing it, which would load them."""
    wheel, name = {
        "rtx": ("onnxruntime-ep-nv-tensorrt-rtx-cu13", _RTX),
        "lean": ("tensorrt-lean-cu13-libs", _LEAN),
    }[library]
    found = next(file for file in metadata.files(wheel) or [] if file.name == name)
    return Path(str(found.locate())).resolve().parent


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")
