"""What this machine is: processor, memory, GPUs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""Extensions, as the Linux kernel spells them, that change how fast matrix products run."""

_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Processor:
    """The CPU.

    Attributes:
        name: as the system reports it.
        architecture: ``x86_64``, ``aarch64``, ...
        physical_cores: cores of the machine, None when the system does not tell.
        usable_threads: hardware threads that this process may run on.
        instruction_sets: those of :data:`INSTRUCTION_SETS` that it has; empty where the system does not list them.
    """

    name: str
    architecture: str
    physical_cores: int | None
    usable_threads: int
    instruction_sets: tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it; memory in bytes."""

    name: str
    memory_bytes: int
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """The whole machine.

    Attributes:
        system: operating system and C library.
        processor: its CPU.
        memory_bytes: RAM this process may use (a container's limit, where there is one).
        available_bytes: RAM free right now.
        gpus: NVIDIA GPUs; empty without a driver.
        gpu_problem: why the driver could not be asked; empty when it was, or when there is none.
    """

    system: str
    processor: Processor
    memory_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...]
    gpu_problem: str


def describe() -> Machine:
    """Look at this machine; takes a fraction of a second."""
    import psutil

    memory = psutil.virtual_memory()
    limit = min([memory.total, *_memory_limits()])
    gpus, problem = _gpus()
    return Machine(
        system=platform.platform(),
        processor=_processor(),
        memory_bytes=limit,
        available_bytes=min(memory.available, limit),
        gpus=gpus,
        gpu_problem=problem,
    )


def high_water_mark(process: int | str) -> int | None:
    """Largest resident memory so far, in bytes, of the process with this number or ``self``; None without /proc.

    What a process finds by ``getrusage`` on Linux is at least its parent's peak, which it inherits.
    """
    status = Path(f"/proc/{process}/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _processor() -> Processor:
    import psutil

    fields: dict[str, str] = {}
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Processor(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        physical_cores=psutil.cpu_count(logical=False),
        usable_threads=threads,
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
    )


def _memory_limits() -> list[int]:
    """Limits set on this process's container ("max" means none)."""
    found = [path.read_text().strip() for path in _MEMORY_LIMITS if path.is_file()]
    return [int(text) for text in found if text.isdigit()]


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), ""
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    try:
        answer = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return (), f"nvidia-smi failed: {error}"
    return tuple(_gpu(line) for line in answer.stdout.splitlines() if line.strip()), ""


def _gpu(line: str) -> Gpu:
    name, mebibytes, driver, capability = (part.strip() for part in line.rsplit(",", 3))
    # Unified-memory devices answer "[N/A]" for their memory.
    memory = int(mebibytes) << 20 if mebibytes.isdigit() else 0
    return Gpu(name=name, memory_bytes=memory, driver=driver, compute_capability=capability)


def session_options() -> dict[str, str]:
    """ONNX Runtime session configuration that this processor needs for exact integer products.

    Without VNNI the fast x86 kernel for uint8 by int8 adds pairs of products in 16 bits, which saturate. The exact one
    is asked for there only: where it is not needed, it would take a third more memory.
    """
    found = _processor()
    if found.architecture not in ("x86_64", "AMD64") or {"avx512_vnni", "avx_vnni"} & set(found.instruction_sets):
        return {}
    return {"session.x64quantprecision": "1"}
