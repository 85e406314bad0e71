"""ONNX Runtime's CUDA provider without a GPU: its own decision which node runs where, and nothing computed.

``QWENFORGE_ONNXRUNTIME_GPU`` names a folder with onnxruntime-gpu in it (``pip install --no-deps --target FOLDER
onnxruntime-gpu``, 260 MB). The CUDA libraries that its provider is linked to are replaced by ones made here: the
functions of runtime.c, and for every other symbol that the provider asks for a function that returns 0. That is enough
to make a session, which partitions the graph, inserts its copies and says whether it would capture it, and to run it:
memory is moved, kernels do nothing, so that what comes out is meaningless.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from support.source_tree import ROOT

VARIABLE = "QWENFORGE_ONNXRUNTIME_GPU"
_HERE = Path(__file__).parent
_PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"


@dataclass(frozen=True)
class Placement:
    """Where a session put the nodes of a graph.

    Attributes:
        on_cpu: (operator, name) of each node on the CPU.
        on_cuda: likewise on the GPU.
        copies: nodes that copy between the two, put in by ONNX Runtime.
        inputs: the memory in which the session wants each input.
    """

    on_cpu: list[tuple[str, str]]
    on_cuda: list[tuple[str, str]]
    copies: int
    inputs: dict[str, str]


def why_missing() -> str:
    """Why nodes cannot be placed here; empty when they can."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return f"{VARIABLE} names no folder with onnxruntime-gpu"
    if not (Path(folder) / _PROVIDER).is_file():
        return f"{folder} ({VARIABLE}) holds no {_PROVIDER}"
    return "" if shutil.which("gcc") and shutil.which("nm") else "gcc or nm is not installed"


def place(model: Path, *, library: Path | None = None, capture: bool = False) -> Placement:
    """Make a session of ``model`` with custom ops from ``library``, asked to capture if ``capture``.

    Raises:
        RuntimeError: ONNX Runtime refuses; the message is its last line.
    """
    finished = _run("place.py", str(model), str(library or ""), str(int(capture)))
    report = json.loads(finished.stdout.splitlines()[-1])
    nodes = {provider: [(op, name) for op, name in found] for provider, found in report["nodes"].items()}
    copies = len(re.findall(r"Add MemcpyFromHost|Add MemcpyToHost", finished.stderr))
    return Placement(nodes.get("CPUExecutionProvider", []), nodes["CUDAExecutionProvider"], copies, report["inputs"])


@dataclass(frozen=True)
class Graphs:
    """What a run did with CUDA graphs: how many it captured, and how often it replayed one."""

    captured: int
    replayed: int


def drive(model: Path, vocabulary: int, *, capture: bool) -> Graphs:
    """Drive ``model`` with the runtime's own session on the device (drive.py): prompts, decode, fewer rows, again.

    Raises:
        RuntimeError: it fails; the message is its last line.
    """
    finished = _run("drive.py", str(model), str(vocabulary), str(int(capture)))
    told = finished.stderr.split()
    return Graphs(told.count("captured"), told.count("replayed"))


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    gpu_build = os.environ[VARIABLE]
    environment = {**os.environ, "PYTHONPATH": gpu_build, "LD_LIBRARY_PATH": str(_libraries(Path(gpu_build)))}
    command = [sys.executable, str(_HERE / script), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if finished.returncode:
        raise RuntimeError(finished.stderr.strip().splitlines()[-1])
    return finished


@functools.cache
def _libraries(gpu_build: Path) -> Path:
    """A folder with a stand-in for each CUDA library that the provider is linked to."""
    provider = gpu_build / _PROVIDER
    source = _HERE / "runtime.c"
    digest = hashlib.sha256(source.read_bytes() + str(provider.stat().st_size).encode()).hexdigest()[:12]
    folder = ROOT / "build" / "cuda_standin" / digest
    if (folder / "ready").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True)
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for line in listed.stdout.splitlines():
        name, _, library = line.split()[-1].partition("@")
        if library.startswith("libcu"):
            wanted[library].add(name)
        elif name.startswith("cu"):
            wanted["libcuda.so.1"].add(name)
    wanted["libcurand.so.10"] |= set()  # linked to, with nothing asked of it
    answered = set(re.findall(r"^[\w *]*?\b(cu\w+)\(", source.read_text(encoding="utf-8"), re.MULTILINE))
    for library, names in wanted.items():
        silent = "".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(names - answered))
        code, symbols = folder / "standin.c", folder / "standin.map"
        included = f'#include "{source}"\n' if names & answered else ""
        code.write_text(included + silent, encoding="utf-8")
        symbols.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        versioned = [] if library == "libcuda.so.1" else [f"-Wl,--version-script={symbols}"]
        command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", *versioned, "-o", folder / library, code]
        subprocess.run(command, check=True)
    (folder / "ready").touch()
    return folder
