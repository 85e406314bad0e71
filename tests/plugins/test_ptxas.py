"""What ptxas says of the kernels: no spills, registers and shared memory as in the committed table, for every GPU."""

from __future__ import annotations

import json

import pytest

from support.plugin_library import why_missing
from support.ptxas import TABLE, Kernel, compiled_kernels, compiler_version, parse, table
from support.summary import TABLES

SMS = (80, 86, 87, 89, 90, 100, 110, 120)
MOST_REGISTERS = {"attendSplit": 168, "attendTiled": 255}
"""Of a thread, by kernel: three and two blocks of 128 threads fit the 65536 registers of a multiprocessor; and of all
other kernels 128, two blocks of 256 threads."""
MOST_SHARED_BYTES = 48 * 1024
"""Of a block, without asking for more (attention's bounds stand beside its launches): two fit the 100 KiB of SM
86, 89 and 120, four those of SM 90."""

pytestmark = pytest.mark.skipif(bool(why_missing()), reason=why_missing() or "-")


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    lines = TABLES.setdefault("kernels: registers a thread and bytes of shared memory a block, by SM", [])
    lines.append(f"{'kernel':<34}" + "".join(f"{sm:>12}" for sm in SMS))
    for name, row in table().items():
        lines.append(f"{name:<34}" + "".join("{:>6}{:>6}".format(*row[str(sm)]) for sm in SMS))
    return compiled_kernels()


@pytest.mark.parametrize("sm", SMS)
def test_kernels_do_not_spill_and_two_blocks_fit(sm: int, kernels: list[Kernel]) -> None:
    found = [kernel for kernel in kernels if kernel.sm == sm]
    # Experts: up and down, 4 kinds of weights, 2 types, 3 tiles.
    assert len([kernel for kernel in found if kernel.name.startswith("project")]) == 48
    assert {kernel.name: (kernel.spills, kernel.stack) for kernel in found} == {k.name: (0, 0) for k in found}
    # Attention: two heads, 16-bit caches of two types and 8-bit ones of two kinds.
    assert len([kernel for kernel in found if kernel.name.startswith(("attendSplit", "attendTiled"))]) == 16
    assert all(kernel.registers <= MOST_REGISTERS.get(kernel.name.split()[0], 128) for kernel in found)
    assert all(kernel.shared <= MOST_SHARED_BYTES for kernel in found)


def test_registers_and_shared_memory_are_those_of_the_table(kernels: list[Kernel]) -> None:
    committed = json.loads(TABLE.read_text(encoding="utf-8"))
    if committed["compiler"] != compiler_version():
        pytest.skip(f"the table is of nvcc {committed['compiler']}, this one is {compiler_version()}")
    changed = {name: row for name, row in table().items() if row != committed["kernels"].get(name)}
    assert not changed and table().keys() == committed["kernels"].keys(), "support/ptxas.py says how to renew the table"


def test_a_spill_would_be_seen() -> None:
    text = """Compiling entry function '_ZN9qwenforge3moe7combineI6__halfEEvNS0_7RoutingE' for 'sm_90'
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 512 bytes smem"""
    assert parse(text) == [Kernel("combine half", 90, 8, 40, 255, 512)]
