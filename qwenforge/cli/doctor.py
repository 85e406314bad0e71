"""``qwenforge doctor``: what this machine can export, build and run, and what to install for more."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qwenforge import __version__, targets
from qwenforge.cli.arguments import add_json
from qwenforge.cli.base import EXIT_DONE, Command

if TYPE_CHECKING:
    from qwenforge.machine import Machine
    from qwenforge.packages import Package


@dataclass(frozen=True)
class Capability:
    """Something qwenforge may be able to do here.

    Attributes:
        name: what, in a few words.
        ready: whether it works on this machine.
        detail: with what it works, or what is missing.
        install: the command that makes it ready; empty when it is ready or no command would.
    """

    name: str
    ready: bool
    detail: str
    install: str = ""


@dataclass(frozen=True)
class _Need:
    """A capability, the libraries it takes (the one that does the work first) and the extra that brings them."""

    name: str
    packages: tuple[str, ...]
    extra: str = ""


_GRAPH = ("onnxscript", "onnx", "onnx-ir", "ml_dtypes", "numpy")
_RUN = ("onnxruntime", "tokenizers", "jinja2", "pydantic", "numpy")
_TRANSFORMERS = ("torch", "transformers")
_NEEDS = (
    _Need("export: checkpoint to bundle, verified", (*_TRANSFORMERS, *_GRAPH, *_RUN, "safetensors"), extra="export"),
    _Need("optimize: graph passes on any ONNX model", (*_GRAPH, "onnxruntime")),
    _Need("run: target ort-cpu", _RUN),
    _Need("run: target portable", _RUN),
    _Need("bench: a bundle", (*_RUN, "psutil")),
    _Need("bench: against transformers", (*_TRANSFORMERS, *_RUN, "psutil"), extra="export"),
)


class DoctorCommand(Command):
    """Report on the machine, the installed libraries and what follows from them."""

    name = "doctor"
    help = "show what this machine can export, build and run"
    description = (
        "Look at the processor, memory, GPUs and installed libraries of this machine and say what qwenforge can do "
        "here, and what to install for more. Imports every library to be sure that it works."
    )
    example = "qwenforge doctor\nqwenforge doctor --json"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """``--json``."""
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print the report; a missing library is a finding, not a failure."""
        from qwenforge.machine import describe
        from qwenforge.packages import survey

        machine = describe()
        packages = survey()
        capabilities = [*assess(packages), assess_cpu_kernels(), *assess_ort_cuda(), *assess_tensorrt()]
        if args.json:
            print(json.dumps(_as_json(machine, packages, capabilities), indent=1))
        else:
            _print(machine, packages, capabilities)
        return EXIT_DONE


def assess(packages: Sequence[Package]) -> list[Capability]:
    """What can be done with ``packages``."""
    by_name = {package.name: package for package in packages}
    found = []
    for need in _NEEDS:
        bad = [by_name[name] for name in need.packages if not by_name[name].usable]
        if bad:
            what = f"qwenforge[{need.extra}]" if need.extra else "qwenforge"
            detail = "; ".join(f"{package.name} {package.problem}" for package in bad)
            found.append(Capability(need.name, False, detail, install=f"pip install --upgrade '{what}'"))
        else:
            lead = by_name[need.packages[0]]
            found.append(Capability(need.name, True, f"{lead.name} {lead.version}"))
    return found


def assess_cpu_kernels() -> Capability:
    """Our kernels for quantized ort-cpu bundles: where their library is, and what instruction set it uses here."""
    from qwenforge.engine.cpu_library import LIBRARY, cpu_library
    from qwenforge.errors import UserError

    name = "kernels for quantized ort-cpu"
    install = "a C++ compiler, then pip install --force-reinstall --no-deps qwenforge"
    try:
        library = cpu_library()
    except UserError as error:
        return Capability(name, False, str(error))
    if library is None:
        detail = f"{LIBRARY} was not built when qwenforge was installed: there was no C++ compiler"
        return Capability(name, False, f"{detail}; ONNX Runtime's kernels are used", install=install)
    return Capability(name, True, f"{library.path}, {library.version}, {library.instruction_set}")


def assess_ort_cuda() -> list[Capability]:
    """Whether ort-cuda bundles run here: onnxruntime-gpu, its CUDA provider, a GPU; and our custom ops' library."""
    from qwenforge.engine.ort_library import find_ort_library
    from qwenforge.errors import UserError
    from qwenforge.runtime.backends import require_cuda

    found = []
    try:
        found.append(Capability("run: target ort-cuda", True, require_cuda()))
    except UserError as error:
        found.append(Capability("run: target ort-cuda", False, str(error)))
    try:
        library = find_ort_library(None)
        found.append(Capability("custom ops for ONNX Runtime", True, f"{library.path}, {library.version}"))
    except UserError as error:
        found.append(Capability("custom ops for ONNX Runtime", False, str(error), install="make plugins"))
    return found


def assess_tensorrt() -> list[Capability]:
    """What of the TensorRT targets can be built here: NVIDIA's module, the GPU, the plugin library."""
    from qwenforge.engine.tensorrt.gpu import local_gpu
    from qwenforge.engine.tensorrt.modules import MODULES, import_tensorrt
    from qwenforge.engine.tensorrt.plugin_library import find_plugin_library
    from qwenforge.errors import UserError
    from qwenforge.tensorrt_choice import TENSORRT

    found = []
    gpu = local_gpu()
    for target, module in MODULES.items():
        name = f"build: target {target}"
        try:
            version = import_tensorrt(target).__version__
        except UserError as error:
            found.append(Capability(name, False, str(error)))
            continue
        if target == TENSORRT and gpu is None:
            found.append(Capability(name, False, f"{module} {version}, but no NVIDIA GPU is visible to build on"))
            continue
        where = f" on {gpu.name} (SM {gpu.sm})" if target == TENSORRT and gpu is not None else ""
        found.append(Capability(name, True, f"{module} {version}{where}"))
    try:
        library = find_plugin_library(None)
        found.append(Capability("plugin library for TensorRT", True, f"{library.path}, {library.version}"))
    except UserError as error:
        found.append(Capability("plugin library for TensorRT", False, str(error), install="make plugins"))
    return found


def _as_json(machine: Machine, packages: Sequence[Package], capabilities: Sequence[Capability]) -> dict[str, Any]:
    return {
        "qwenforge": __version__,
        "python": platform.python_version(),
        "machine": asdict(machine),
        "packages": [asdict(package) | {"usable": package.usable} for package in packages],
        "capabilities": [asdict(capability) for capability in capabilities],
        "targets": {target.name: list(target.dtypes) for target in targets.TARGETS.values()},
    }


def _print(machine: Machine, packages: Sequence[Package], capabilities: Sequence[Capability]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("machine", "", title=f"qwenforge {__version__} on Python {platform.python_version()}")
    for label, value in _machine_rows(machine):
        table.add_row(label, escape(value))
    console.print(table)

    table = Table("library", "installed", "needed", "state")
    for package in packages:
        wanted = f">= {package.minimum}" if package.minimum else "any"
        wanted += f" (extra: {package.extra})" if package.extra else ""
        state = "[green]ok[/]" if package.usable else f"[red]{escape(package.problem)}[/]"
        table.add_row(package.name, package.version or "-", wanted, state)
    console.print(table)

    table = Table("can do", "", "how, or what is missing")
    for capability in capabilities:
        table.add_row(
            capability.name, "[green]yes[/]" if capability.ready else "[yellow]no[/]", escape(capability.detail)
        )
    console.print(table)
    for command in dict.fromkeys(capability.install for capability in capabilities if capability.install):
        console.print(f"for more: {escape(command)}")


def _machine_rows(machine: Machine) -> list[tuple[str, str]]:
    cpu = machine.processor
    cores = f"{cpu.physical_cores} cores, " if cpu.physical_cores else ""
    rows = [
        ("system", machine.system),
        ("processor", f"{cpu.name} ({cpu.architecture})"),
        ("", f"{cores}{cpu.usable_threads} threads usable"),
        ("instruction sets", " ".join(cpu.instruction_sets) or "none that matter here"),
        ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB, {machine.available_bytes / 2**30:.1f} GiB free"),
    ]
    for gpu in machine.gpus:
        memory = f"{gpu.memory_bytes / 2**30:.0f} GiB, " if gpu.memory_bytes else ""
        rows.append(("GPU", f"{gpu.name}: {memory}SM {gpu.compute_capability}, driver {gpu.driver}"))
    if not machine.gpus:
        rows.append(("GPU", machine.gpu_problem or "no NVIDIA driver found"))
    return rows
