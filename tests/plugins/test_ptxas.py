"""What ptxas says of the kernels: no spills, and registers and shared memory within a block's limits, for every GPU."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.plugin_library import cuda_folder
from support.source_tree import ROOT
from support.summary import TABLES

SMS = (80, 86, 87, 89, 90, 100, 110, 120)
SOURCES = ("attention/attention.cu", "moe/moe.cu")
MOST_REGISTERS = 128
"""Of a thread: at 256 threads two blocks fit the 65536 registers of a multiprocessor."""
MOST_SHARED_BYTES = 48 * 1024
"""Of a block, without asking for more."""

pytestmark = pytest.mark.skipif(
    cuda_folder() is None, reason="no CUDA compiler is installed: pip install --no-deps -r tests/requirements.txt"
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas prints of one kernel, in bytes and registers a thread."""

    name: str
    stack: int
    spills: int
    registers: int
    shared: int


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[Kernel]]:
    folder = tmp_path_factory.mktemp("ptxas")
    jobs = [(source, sm) for source in SOURCES for sm in SMS]
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(jobs, pool.map(lambda job: _compile(*job, folder), jobs), strict=True))
    table = TABLES.setdefault("kernels: registers a thread and bytes of shared memory a block, by SM", [])
    table.append(f"{'kernel':<34}" + "".join(f"{sm:>12}" for sm in SMS))
    for source in SOURCES:
        for index, kernel in enumerate(results[source, SMS[0]]):
            same = [results[source, sm][index] for sm in SMS]
            table.append(f"{kernel.name:<34}" + "".join(f"{k.registers:>6}{k.shared:>6}" for k in same))
    return results


def _compile(source: str, sm: int, folder: Path) -> list[Kernel]:
    cuda = cuda_folder()
    assert cuda is not None
    output = folder / f"{Path(source).stem}-{sm}.cubin"
    command = [str(cuda / "bin" / "nvcc"), "-std=c++17", f"-arch=sm_{sm}", "-cubin", "-Xptxas", "-v"]
    command += [f"-I{ROOT / 'plugins'}", "-o", str(output), str(ROOT / "plugins" / source)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return _parse(finished.stderr)


def _parse(text: str) -> list[Kernel]:
    found = []
    for part in text.split("Compiling entry function '")[1:]:
        mangled = part.partition("'")[0]
        stack, stores, loads = (
            int(number)
            for number in re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups()  # type: ignore[union-attr]
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(Kernel(_short(mangled), stack, stores + loads, registers, int(shared[1]) if shared else 0))
    return sorted(found, key=lambda kernel: kernel.name)


def _short(mangled: str) -> str:
    """``_ZN9qwenforge9attention6attendI6__halfLi2EEEv...`` as ``attend half 2``."""
    names = re.match(r"_ZN9qwenforge\d+(?:moe|attention)(\d+)(\w+)", mangled)
    assert names is not None, mangled
    name = names[2][: int(names[1])]
    kind = "half" if "__half" in mangled else "bfloat16" if "bfloat16" in mangled else ""
    size = re.search(r"Li(\d+)E", mangled)
    return " ".join(filter(None, (name, kind, size[1] if size else "")))


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_do_not_spill_and_fit(source: str, sm: int, kernels: dict[tuple[str, int], list[Kernel]]) -> None:
    found = kernels[source, sm]
    assert len(found) == {"attention/attention.cu": 8, "moe/moe.cu": 18}[source]
    assert {kernel.name: (kernel.spills, kernel.stack) for kernel in found} == {k.name: (0, 0) for k in found}
    assert all(kernel.registers <= MOST_REGISTERS for kernel in found)
    assert all(kernel.shared <= MOST_SHARED_BYTES for kernel in found)


def test_a_spill_would_be_seen() -> None:
    text = """Compiling entry function '_ZN9qwenforge3moe7combineI6__halfEEvNS0_7RoutingE' for 'sm_90'
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 512 bytes smem"""
    assert _parse(text) == [Kernel("combine half", 8, 40, 255, 512)]
