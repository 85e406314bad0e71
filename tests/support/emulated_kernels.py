"""bench/kernel_library.py's kernels on the CPU: a library of them compiled for the emulator."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from qwenforge.bench.kernel_library import PLUGINS, Kernels
from support import simt
from support.plugin_library import cuda_folder
from support.source_tree import ROOT


def kernels(allocate: Callable[[int], torch.Tensor] | None = None) -> Kernels:
    """The kernels; ``allocate`` gives their workspace."""
    return Kernels(_library(), allocate or (lambda size: aligned(size // 2 + 1).view(torch.int8)))


def aligned(*size: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Uninitialized, at a multiple of 256 bytes, as CUDA's memory is."""
    count = int(np.prod(size))
    space = torch.empty(count * dtype.itemsize + 256, dtype=torch.uint8)
    start = -space.data_ptr() % 256
    return space[start : start + count * dtype.itemsize].view(dtype).view(size)


@functools.cache
def _library() -> Path:
    library = Path(tempfile.mkdtemp()) / "kernels.so"
    cuda = cuda_folder()
    assert cuda is not None
    sources = [*PLUGINS.glob("moe/*.cu"), *PLUGINS.glob("attention/*.cu"), PLUGINS / "common" / "kernels_c_api.cpp"]
    sources += [PLUGINS / "moe" / "cutlass" / "grouped_missing.cpp", ROOT / "tests" / "cpp" / "cuda_stub.cpp"]
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-DQWENFORGE_SIMT", f"-I{PLUGINS}"]
    command += [f"-I{Path(simt.__file__).parent}", "-isystem", str(cuda / "include"), "-x", "c++"]
    subprocess.run([*command, *map(str, sources), "-o", str(library)], check=True)
    return library
