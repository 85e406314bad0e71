"""``bench/kernels.py`` as far as it goes without a GPU: its structures, and what it says is missing."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwenforge.bench import kernels
from support import simt
from support.plugin_library import cuda_folder
from support.source_tree import ROOT


def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, ROOT / "bench" / "kernels.py", "--nvcc", "nvcc"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": ""})
    assert finished.returncode == 1 and finished.stdout == ""
    assert finished.stderr == "bench/kernels.py: error: no NVIDIA GPU is visible\n"


@pytest.mark.skipif(bool(simt.why_missing()), reason=simt.why_missing() or "-")
def test_structures_are_those_of_the_kernels(tmp_path: Path) -> None:
    """The C functions, emulated, called as the benchmark calls them."""
    cuda, library = cuda_folder(), tmp_path / "kernels.so"
    assert cuda is not None
    sources = [str(kernels.PLUGINS / name) for name in kernels.SOURCES]
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-DQWENFORGE_SIMT", f"-I{kernels.PLUGINS}"]
    command += [f"-I{Path(simt.__file__).parent}", "-isystem", str(cuda / "include"), "-x", "c++", *sources]
    subprocess.run([*command, str(ROOT / "tests" / "cpp" / "cuda_stub.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    generator = np.random.default_rng(0)

    def draw(*size: int) -> np.ndarray:
        """float16, at a multiple of 16 bytes."""
        values = generator.normal(0, 0.5, size).astype(np.float16)
        space = np.zeros(values.nbytes + 256, np.uint8)
        start = -space.ctypes.data % 256
        placed = space[start : start + values.nbytes].view(np.float16).reshape(size)
        placed[...] = values
        return placed

    tokens, hidden, width, experts, shared, top_k = 6, 32, 16, 5, 2, 2
    tensors = [draw(tokens, hidden), draw(tokens, experts), draw(experts + shared, 2 * width, hidden)]
    tensors += [draw(experts + shared, hidden, width), draw(tokens, 1)]
    output, workspace = draw(tokens, hidden), draw(1 << 20)
    shape = kernels.MoeShape(tokens, hidden, width, experts, shared, top_k, True)
    addresses = (ctypes.c_void_p * 6)(*(tensor.ctypes.data for tensor in [*tensors, output]))
    loaded.qwenforgeMoeWorkspaceBytes.restype = ctypes.c_size_t
    size = loaded.qwenforgeMoeWorkspaceBytes(ctypes.byref(shape))
    assert 0 < size <= workspace.nbytes
    space = ctypes.c_void_p(workspace.ctypes.data)
    assert (
        loaded.qwenforgeMoe(ctypes.byref(shape), 0, ctypes.byref(addresses), space, ctypes.c_size_t(size), None, 1) == 0
    )
    raw = simt.run("moe", "float16", [tokens, hidden, width, experts, shared, top_k, 1, 1], tensors)
    assert output.tobytes() == raw

    batch, capacity, heads, kv_heads, head_size = 2, 16, 4, 2, 8
    call = kernels.AttentionShape(batch, 1, capacity, capacity, heads, kv_heads, head_size, 0, 0.25)
    floats = [draw(batch, 1, heads * head_size), *(draw(batch, 1, kv_heads * head_size) for _ in range(2))]
    floats += [draw(capacity, head_size // 2), draw(capacity, head_size // 2)]
    caches = [draw(batch, kv_heads, capacity, head_size) for _ in range(2)]
    integers = [draw(16).view(np.int32)[:batch], draw(16).view(np.int32)[:batch]]
    integers[0][:], integers[1][:] = [3, 7], [3, 7]
    numbers = [batch, 1, capacity, capacity, heads, kv_heads, head_size, 0, 0.25]
    raw = simt.run("attention", "float16", numbers, [*floats, *integers, *caches])
    answer = draw(batch, 1, heads * head_size)
    addresses = (ctypes.c_void_p * 10)(*(tensor.ctypes.data for tensor in [*floats, *integers, *caches, answer]))
    loaded.qwenforgeAttentionWorkspaceBytes.restype = ctypes.c_size_t
    size = loaded.qwenforgeAttentionWorkspaceBytes(ctypes.byref(call))
    status = loaded.qwenforgeAttention(
        ctypes.byref(call), 0, ctypes.byref(addresses), space, ctypes.c_size_t(size), None
    )
    assert status == 0 and answer.tobytes() + caches[0].tobytes() + caches[1].tobytes() == raw
