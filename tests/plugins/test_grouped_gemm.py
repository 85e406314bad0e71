"""The experts' products by CUTLASS: what the device is told about them, what the compiler made, builds without it.

The products themselves need a GPU of compute capability 9.0 (QWENFORGE_KERNELS_ON=cuda): ours does not emulate TMA.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from support import grouped_gemm, simt
from support.plugin_library import cmake, why_missing
from support.summary import TABLES
from support.tolerances import BFLOAT16, FLOAT16

NOTHING = why_missing() or ("" if shutil.which("g++") else "g++ is not installed")
pytestmark = pytest.mark.skipif(bool(NOTHING), reason=NOTHING or "-")
NO_CUTLASS = NOTHING or grouped_gemm.why_missing()
with_cutlass = pytest.mark.skipif(bool(NO_CUTLASS), reason=NO_CUTLASS or "-")

DTYPES = {"float16": (torch.float16, FLOAT16), "bfloat16": (torch.bfloat16, BFLOAT16)}
TILES = {"64x128": 0, "128x128": 1}
COUNTS = {
    "one expert": [3],
    "an expert without positions in between": [5, 0, 1],
    "none for the first and the last": [0, 0, 7, 2, 0],
    "no positions": [0] * 9,
    "a warp and one more": [index % 4 for index in range(33)],
    "as many experts as there can be": [index * 7 % 11 for index in range(320)],
}
ALIGNMENT = 256
MOST_SHARED_BYTES = 227 * 1024
"""Of a block on compute capability 9.0, for a kernel that asks for it."""


@pytest.mark.skipif(simt.ON_GPU, reason="the kernel is emulated; on a GPU the products show what it wrote")
@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("name", COUNTS)
def test_setup_writes_every_shape_address_and_stride(name: str, schedule: int) -> None:
    counts, rows, depth = COUNTS[name], 2816, 2048
    inputs, weights, outputs = 0x7F0000000000, 0x7E0000000000, 0x7D0000000010
    firsts = [0, *accumulate(counts)][:-1]
    arrays = [
        ("3i", [(count, rows, depth) for count in counts]),
        ("Q", [(inputs + 2 * first * depth,) for first in firsts]),
        ("Q", [(weights + 2 * expert * rows * depth,) for expert in range(len(counts))]),
        ("Q", [(outputs + 2 * first * rows,) for first in firsts]),
        ("q", [(depth,) for _ in counts]),
        ("q", [(rows,) for _ in counts]),
    ]
    expected = b""
    for format_, elements in arrays:
        packed = b"".join(struct.pack("<" + format_, *element) for element in elements)
        expected += packed + b"\xff" * (-len(packed) % ALIGNMENT)
    assert grouped_gemm.described(schedule, [rows, depth, inputs, weights, outputs], counts) == expected


@with_cutlass
def test_tiles_do_not_spill_and_are_compiled_for_the_matrix_instructions() -> None:
    """A tile compiled for plain sm_90 would be a kernel that only says so, of a few registers."""
    table = TABLES.setdefault("CUTLASS's tiles: registers a thread", [])
    found = {}
    for path in grouped_gemm.objects():
        words = path.with_name(path.name + ".log").read_text()
        assert words.count("Compiling entry function") == words.count("for 'sm_90a'") == 1, words
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", words)
        assert spills == [("0", "0", "0")], words
        found[path.name.removesuffix(".cu.o")] = int(re.findall(r"Used (\d+) registers", words)[0])
        assert "warning" not in words.lower()
    table += [f"{name:<24}{registers:>6}" for name, registers in found.items()]
    tiles = {f"sm90_{dtype}_{tile}" for dtype in ("half", "bfloat16") for tile in TILES}
    assert set(found) == tiles | {"grouped_gemm"}
    # 384 threads of 168 registers fill a multiprocessor; the kernel then moves them between its warp groups.
    assert {name: found[name] for name in tiles} == dict.fromkeys(tiles, 168)


@with_cutlass
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_launch_neither_allocates_nor_waits_nor_reads_back() -> None:
    """All of CUDA's runtime that the objects can reach; the driver only through it."""
    command = ["nm", "-u", *map(str, grouped_gemm.objects())]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r" U (cu[A-Z]\w*|cuda\w*)", text)) == {
        "cudaDeviceGetAttribute",  # these two only where CUTLASS is not told of the multiprocessors
        "cudaGetDevice",
        "cudaFuncSetAttribute",
        "cudaGetDriverEntryPointByVersion",
        "cudaGetLastError",
        "cudaLaunchKernelExC",
    }


@with_cutlass
def test_workspace_grows_with_experts_and_multiprocessors() -> None:
    def measured(experts: int, multiprocessors: int) -> int:
        return int(grouped_gemm.call(grouped_gemm.library_driver(), "bytes", experts, multiprocessors))

    experts = [measured(number, 132) for number in (1, 2, 60, 64, 128, 320)]
    multiprocessors = [measured(64, number) for number in (2, 3, 78, 114, 132, 133)]
    assert experts == sorted(experts) and multiprocessors == sorted(multiprocessors)
    # 64 shapes, three addresses and two strides; TMA descriptors of A, of B and, for two warp groups, of the outputs.
    assert measured(64, 132) == 64 * (12 + 5 * 8) + 132 * 4 * 128
    assert measured(0, 132) == measured(64, 1) == 0


RIGHT = {"tile": 0, "experts": 4, "rows": 16, "depth": 24, "multiprocessors": 132, "offset": 0, "missing": 0}
WRONG = {
    "another tile": {"tile": 2},
    "no experts": {"experts": 0},
    "rows that are no multiple of 8": {"rows": 12},
    "no rows": {"rows": 0},
    "depth that is no multiple of 8": {"depth": 20},
    "no depth": {"depth": 0},
    "fewer multiprocessors than a cluster has": {"multiprocessors": 1},
    "addresses that are not aligned": {"offset": 8},
    "a workspace that is not aligned": {"offset": 16},
    "a workspace that is too small": {"missing": 1},
}


@with_cutlass
@pytest.mark.parametrize("name", WRONG)
def test_wrong_call_is_refused(name: str) -> None:
    numbers = {**RIGHT, **WRONG[name]}.values()
    assert grouped_gemm.call(grouped_gemm.library_driver(), "launch", "float16", *numbers) == b"cudaErrorInvalidValue\n"


@with_cutlass
@pytest.mark.skipif(simt.ON_GPU, reason="the addresses are nowhere")
def test_right_call_fails_for_want_of_a_gpu_alone() -> None:
    said = grouped_gemm.call(grouped_gemm.library_driver(), "launch", "bfloat16", *RIGHT.values())
    assert said in (b"cudaErrorInsufficientDriver\n", b"cudaErrorNoDevice\n")


@with_cutlass
@pytest.mark.parametrize("multiprocessors", [2, 78, 132, 133])
@pytest.mark.parametrize("experts", [1, 60, 320])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_launch_asks_cuda_for_this_and_nothing_else(dtype: str, tile: str, experts: int, multiprocessors: int) -> None:
    numbers = {**RIGHT, "tile": TILES[tile], "experts": experts, "multiprocessors": multiprocessors}
    said = grouped_gemm.call(grouped_gemm.recording_driver(), "launch", dtype, *numbers.values()).decode().splitlines()
    setup, *encoded, allowed, launched, result = said
    assert setup == f"launch {-(-experts // 8)}x1x1 256 0" and result == "cudaSuccess"
    # Inputs, weights (half a tile of them where the other block of a cluster loads the rest) and outputs.
    assert (
        encoded
        == {
            "64x128": ["encode 64x64 128", "encode 64x128 128", "encode 32x64 64"],
            "128x128": ["encode 64x128 128", "encode 64x64 128", "encode 32x128 64"],
        }[tile]
    )
    shared = int(allowed.removeprefix("allow "))
    assert 200 * 1024 < shared <= MOST_SHARED_BYTES
    blocks, cluster = (multiprocessors, "") if tile == "64x128" else (multiprocessors // 2 * 2, " 2x1x1")
    assert launched == f"launch {blocks}x1x1 384 {shared}{cluster}"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("-DCUTLASS_INCLUDE_DIR=OFF", "CUTLASS: no, CUTLASS_INCLUDE_DIR is OFF"),
        ("-DCMAKE_CUDA_ARCHITECTURES=80-real;100", "CUTLASS: no, the library is not for compute capability 9.0"),
    ],
    ids=["switched off", "other GPUs"],
)
def test_library_without_cutlass_says_so(option: str, words: str, tmp_path: Path) -> None:
    configured = cmake("--preset", "plugins", "-B", tmp_path, option)
    assert configured.returncode == 0 and words in configured.stdout, configured.stdout + configured.stderr
    targets = cmake("--build", tmp_path, "--", "-t", "targets", "all").stdout
    assert set(re.findall(r"moe/cutlass/(\S+)\.o:", targets)) == {"grouped_missing.cpp"}
    missing = "plugins/CMakeFiles/qwenforge_plugins.dir/moe/cutlass/grouped_missing.cpp.o"
    assert cmake("--build", tmp_path, "--target", missing).returncode == 0


def test_products_without_cutlass_are_not_supported() -> None:
    driver = grouped_gemm.missing_driver()
    assert grouped_gemm.call(driver, "launch", "float16", *RIGHT.values()) == b"cudaErrorNotSupported\n"
    assert grouped_gemm.call(driver, "bytes", 64, 132) == b"0\n"


def test_folder_without_cutlass_is_refused(tmp_path: Path) -> None:
    refused = cmake("--preset", "plugins", "-B", tmp_path / "build", f"-DCUTLASS_INCLUDE_DIR={tmp_path}")
    assert refused.returncode and "there is no cutlass/version.h" in " ".join(refused.stderr.split())


def test_old_cutlass_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "cutlass").mkdir()
    (tmp_path / "cutlass" / "version.h").write_text("#define CUTLASS_MAJOR 3\n", encoding="utf-8")
    configured = cmake("--preset", "plugins", "-B", tmp_path / "build", f"-DCUTLASS_INCLUDE_DIR={tmp_path}")
    assert configured.returncode == 0 and "is of CUTLASS 3, older than 4" in configured.stdout


@with_cutlass
@pytest.mark.skipif(not simt.ON_GPU, reason="there is no GPU of compute capability 9.0")
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("rows", "depth"), [(8, 8), (136, 72), (256, 512)], ids=["smallest", "odd", "whole tiles"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_match_float64(dtype: str, tile: str, rows: int, depth: int, name: str) -> None:
    """Every third expert has 50 times the positions: more than one tile of them."""
    counts = [count * 50 if index % 3 == 0 else count for index, count in enumerate(COUNTS[name])]
    type_, tolerance = DTYPES[dtype]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(sum(counts), depth, generator=generator).to(type_)
    weights = (torch.randn(len(counts), rows, depth, generator=generator) * depth**-0.5).to(type_)
    data = b"".join(tensor.view(torch.int16).numpy().tobytes() for tensor in (inputs, weights))
    numbers = (dtype, TILES[tile], rows, depth, *counts)
    raw = grouped_gemm.call(grouped_gemm.library_driver(), "product", *numbers, data=data)
    found = torch.from_numpy(np.frombuffer(raw, np.int16).copy()).view(type_).view(sum(counts), rows)
    parts = inputs.double().split(counts)
    expected = torch.cat([part @ weight.double().T for part, weight in zip(parts, weights, strict=True)])
    if sum(counts):
        assert float((found.double() - expected).abs().max() / expected.abs().max()) <= tolerance
