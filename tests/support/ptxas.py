"""What ptxas says of the kernels, from the library's build; ``python tests/support/ptxas.py`` prints the table of it.

The committed table, ``tests/plugins/ptxas_table.json``, holds registers a thread and bytes of shared memory a block, by
kernel and SM, for one version of the compiler:

    PYTHONPATH=tests python tests/support/ptxas.py > tests/plugins/ptxas_table.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass

from support.plugin_library import FOLDER, cuda_folder, plugin_library
from support.source_tree import ROOT

TABLE = ROOT / "tests" / "plugins" / "ptxas_table.json"
_WEIGHTS = {"0": "", "1": "int8", "2": "int4", "3": "fp8"}
_CACHES = {"0": "", "1": "fp8", "2": "int8"}


@dataclass(frozen=True)
class Kernel:
    """What ptxas prints of one kernel, in bytes and registers a thread."""

    name: str
    sm: int
    stack: int
    spills: int
    registers: int
    shared: int


def compiled_kernels() -> list[Kernel]:
    """Every kernel of the library for every SM, CUTLASS's left out."""
    plugin_library()
    logs = sorted((FOLDER / "plugins" / "CMakeFiles" / "qwenforge_kernels.dir").rglob("*.o.log"))
    return [kernel for log in logs for kernel in parse(log.read_text(encoding="utf-8"))]


def compiler_version() -> str:
    """Of nvcc, ``13.0.88``."""
    cuda = cuda_folder()
    assert cuda is not None
    words = subprocess.run([cuda / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", words)
    assert found is not None, words
    return found[1]


def parse(text: str) -> list[Kernel]:
    """The kernels of which ``text``, ptxas's words, speaks."""
    found = []
    for part in text.split("Compiling entry function '")[1:]:
        numbers = [
            re.search(pattern, part)
            for pattern in (
                r"' for 'sm_(\d+)",
                r"(\d+) bytes stack frame",
                r"(\d+) bytes spill stores",
                r"(\d+) bytes spill loads",
                r"Used (\d+) registers",
                r"(\d+) bytes smem",
            )
        ]
        sm, stack, stores, loads, registers, shared = (int(match[1]) if match else 0 for match in numbers)
        found.append(Kernel(_short(part.partition("'")[0]), sm, stack, stores + loads, registers, shared))
    return found


def _short(mangled: str) -> str:
    """``_ZN9qwenforge3moe9projectUpILNS_10WeightTypeE2E6__halfLi16EEEv...`` as ``projectUp int4 half 16``."""
    names = re.match(r"_ZN9qwenforge\d+(?:moe|attention)(\d+)(\w+)", mangled)
    assert names is not None, mangled
    name = names[2][: int(names[1])]
    weights, cache = re.search(r"WeightTypeE(\d)E", mangled), re.search(r"CacheTypeE(\d)E", mangled)
    packed = _WEIGHTS[weights[1]] if weights else _CACHES[cache[1]] if cache else ""
    kind = "half" if "__half" in mangled else "bfloat16" if "bfloat16" in mangled else ""
    size = re.search(r"Li(\d+)E", mangled)
    return " ".join(filter(None, (name, packed, kind, size[1] if size else "")))


def table() -> dict[str, dict[str, list[int]]]:
    """Registers and shared memory, by kernel and SM."""
    rows: dict[str, dict[str, list[int]]] = {}
    for kernel in sorted(compiled_kernels(), key=lambda kernel: (kernel.name, kernel.sm)):
        rows.setdefault(kernel.name, {})[str(kernel.sm)] = [kernel.registers, kernel.shared]
    return rows


if __name__ == "__main__":
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table().items()]
    sys.stdout.write(f'{{\n"compiler": "{compiler_version()}",\n"kernels": {{\n' + ",\n".join(lines) + "\n}}\n")
