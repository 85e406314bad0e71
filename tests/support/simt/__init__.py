"""The plugins' kernels on the CPU: the emulator (simt.h) and the program that calls them (driver.cpp), from Python.

With QWENFORGE_KERNELS_ON=cuda in the environment the same calls run on this machine's GPU (tests/gpu/run.sh does that),
checked ones under compute-sanitizer.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from support.plugin_library import cuda_folder
from support.source_tree import ROOT

Array = npt.NDArray[Any]
_HERE = Path(__file__).parent
_SOURCES = ("attention", "common", "moe")
_SUFFIXES = {".h", ".cuh", ".cu", ".inc"}
_CHECKED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")


ON_GPU = os.environ.get("QWENFORGE_KERNELS_ON") == "cuda"
"""Whether the kernels run on the GPU and not in the emulator."""
_SANITIZER = os.environ.get("QWENFORGE_SANITIZER", "memcheck")
"""compute-sanitizer's tool for checked runs on a GPU; ``none`` where it does not work."""


class KernelError(Exception):
    """The call failed: the emulator, AddressSanitizer or the launcher said no."""


def why_missing() -> str:
    """Why the kernels cannot be emulated here; empty when they can."""
    if cuda_folder() is None:
        return "no CUDA headers are installed: pip install --no-deps -r tests/requirements.txt"
    return "" if shutil.which("g++") else "g++ is not installed"


def run(
    op: str,
    dtype: str,
    numbers: Sequence[float],
    tensors: Sequence[Array],
    *,
    schedule: int = 0,
    checked: bool = False,
    sources: Path | None = None,
    only: int | None = None,
) -> bytes:
    """One call of the kernels of ``op`` (driver.cpp has the order of numbers and tensors); the outputs' bytes.

    Args:
        dtype: ``float16`` or ``bfloat16``, what the tensors of 16 bits hold.
        schedule: the order in which threads run.
        checked: with AddressSanitizer and UndefinedBehaviorSanitizer.
        sources: a folder of changed sources in the place of ``plugins``.
        only: compile this part alone: 0 attention, 1 + weight type the experts with such weights.

    Raises:
        KernelError: the process did not end well; its last words are in the message.
    """
    part = 0 if op == "attention" else only
    program = str(driver(checked and not ON_GPU, sources, None if ON_GPU else part))
    command = [program, str(schedule), op, dtype, *(repr(float(number)) for number in numbers)]
    if ON_GPU and checked and _SANITIZER != "none":
        command = ["compute-sanitizer", "--tool", _SANITIZER, "--error-exitcode", "99", "--quiet", *command]
    data = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors)
    finished = subprocess.run(command, input=data, capture_output=True, check=False, timeout=300)
    if finished.returncode:
        raise KernelError(f"exit code {finished.returncode}: {finished.stderr.decode(errors='replace')[:2000]}")
    return finished.stdout


def changed_sources(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the plugins' sources in ``folder``, the one occurrence of ``old`` in ``file`` replaced by ``new``."""
    copy = shutil.copytree(ROOT / "plugins", folder / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / file
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{old!r} occurs {text.count(old)} times in {file}")
    path.write_text(text.replace(old, new), encoding="utf-8")
    return Path(copy)


@functools.cache
def driver(checked: bool = False, sources: Path | None = None, only: int | None = None) -> Path:
    """The compiled driver, made once for its sources."""
    folder = sources or ROOT / "plugins"
    files = sorted(path for name in _SOURCES for path in (folder / name).rglob("*") if path.suffix in _SUFFIXES)
    place = ROOT / "build" / "simt"
    place.mkdir(parents=True, exist_ok=True)
    kind = "cuda" if ON_GPU else "checked" if checked else "driver"
    cuda = cuda_folder()
    assert cuda is not None, why_missing()
    if ON_GPU:
        command = [str(cuda / "bin" / "nvcc"), "-std=c++17", "-O2", "-arch=native", "-lineinfo", "-x", "cu"]
        command += [f"-I{folder}", f"-I{_HERE}"]
    else:
        # Changed sources run a few small calls: what counts is how long they take to compile.
        level = "-O1" if sources is None else "-O0"
        command = ["g++", "-std=c++17", level, "-DQWENFORGE_SIMT", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
        command += [f"-I{folder}", f"-I{_HERE}", "-isystem", str(cuda / "include"), *(_CHECKED if checked else ())]
    if only is not None:
        command += [f"-DDRIVER_ONLY={only}", "-no-pie", "-Wl,--unresolved-symbols=ignore-all"]
    contents = [path.read_bytes() for path in [*files, *sorted(_HERE.glob("*.h")), _HERE / "driver.cpp"]]
    digest = hashlib.sha256(b"".join([*(part.encode() for part in command[1:] if str(folder) not in part), *contents]))
    program = place / f"{kind}-{digest.hexdigest()[:16]}"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            partial = program.with_suffix(".partial")
            finished = subprocess.run(
                [*command, str(_HERE / "driver.cpp"), "-o", str(partial)], capture_output=True, text=True, check=False
            )
            if finished.returncode:
                raise KernelError(f"the kernels do not compile for the CPU: {finished.stderr[:4000]}")
            partial.rename(program)
    return program
