"""What runs a bundle's graph: ONNX Runtime on the CPU, or on an NVIDIA GPU.

A :class:`Backend` is all that tells the two apart; the session and the decoding loop are the same code.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenforge.engine.cpu_library import find_cpu_library
from qwenforge.engine.ort_library import find_ort_library
from qwenforge.engine.tensorrt.gpu import local_gpu
from qwenforge.errors import UserError
from qwenforge.machine import session_options
from qwenforge.manifest import OrtCpuRecord, OrtCudaRecord
from qwenforge.ort_cuda_choice import captures_decode, needs_library
from qwenforge.runtime.memory import CUDA, DeviceMemory, HostMemory, Memory

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"

_FATAL = 4

OLDEST_GPU_BUILD = (1, 31)
"""The oldest onnxruntime-gpu whose kernels were looked up (graph_passes/lower/ort_cuda_kernels.py)."""

INSTALL_GPU_BUILD = (
    "pip uninstall onnxruntime, then pip install --force-reinstall --no-deps 'onnxruntime-gpu>=1.31' (both are the "
    "Python module onnxruntime, and only one of them can be there)"
)


@dataclass(frozen=True)
class Backend:
    """How sessions are made and where their tensors live.

    Attributes:
        name: as errors call it.
        providers: ONNX Runtime's execution providers, the first of which has to be there.
        memory: of caches, logits and the inputs that the graph reads on the device.
        library: of custom ops; None where the graph has none.
        packs_weights: whether the ops keep weights in an order of their own, so that little of the file is read twice.
        captures_decode: whether decode steps are captured as CUDA graphs.
        host: of the inputs that the graph reads on the host.
        cache_types: of caches, as ONNX Runtime spells them.
        other_dtype: what to export with where the caches are of another type.
        session_options: ONNX Runtime session configuration that the machine needs, whatever the bundle.
        prefill_chunk: tokens of a prefill step.
    """

    name: str
    providers: list[Any]
    memory: Memory
    cache_types: tuple[str, ...]
    other_dtype: str
    library: Path | None = None
    packs_weights: bool = False
    captures_decode: bool = False
    host: Memory = field(default_factory=HostMemory)
    session_options: dict[str, str] = field(default_factory=dict)
    prefill_chunk: int = 512


def cpu_backend(record: OrtCpuRecord | None = None, *, library: Path | None = None) -> Backend:
    """ONNX Runtime on the CPU, for a graph made of what ``record`` says; None is ONNX Runtime's own operators.

    Args:
        library: libqwenforge_cpu.so; by default from the environment or where qwenforge is installed.

    Raises:
        UserError: the graph has our ops and the library is missing or another one; the message says what to do.
    """
    ours = record is not None and record.kernels == "qwenforge"
    return Backend(
        name="ONNX Runtime on the CPU",
        providers=[CPU_PROVIDER],
        memory=HostMemory(),
        cache_types=("tensor(float)", "tensor(float16)"),
        other_dtype="fp32",
        library=find_cpu_library(library).path if ours else None,
        packs_weights=ours,
        session_options=session_options(),
        # GroupQueryAttention computes the square of a step's tokens, half of which nobody sees: 512 tokens of int8
        # weights take 0.93 of the time in two steps, of fp32 weights the same.
        prefill_chunk=256,
    )


def cuda_backend(record: OrtCudaRecord, *, library: Path | None = None, gpu: int = 0) -> Backend:
    """ONNX Runtime on the GPU number ``gpu``, for a graph made of what ``record`` says.

    Args:
        library: libqwenforge_ort.so; by default from the environment or where it is built.

    Raises:
        UserError: onnxruntime-gpu, a GPU or the library is missing; the message says what to do.
    """
    require_cuda()
    found = find_ort_library(library) if needs_library(record) else None
    captures = captures_decode(record)
    options = {
        "device_id": str(gpu),
        # An arena that grows by doubling could reserve twice what the largest cache takes.
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1" if captures else "0",
    }
    memory = DeviceMemory(CUDA, gpu, [(CUDA_PROVIDER, {"device_id": str(gpu)}), CPU_PROVIDER])
    # Before the bundle's session: without its provider, that would complain of a node that the CPU cannot run.
    require_provider(CUDA_PROVIDER, memory.providers)
    return Backend(
        name="ONNX Runtime on CUDA",
        # The CPU has the few nodes that compute shapes and lengths (graph_passes/lower/ort_cuda_kernels.py).
        providers=[(CUDA_PROVIDER, options), CPU_PROVIDER],
        memory=memory,
        cache_types=("tensor(float16)", "tensor(bfloat16)", "tensor(int8)"),
        other_dtype="bf16",
        library=found.path if found is not None else None,
        captures_decode=captures,
    )


def require_cuda() -> str:
    """Make sure that ONNX Runtime can use a GPU here; returns its version and the GPU's name.

    Raises:
        UserError: onnxruntime-gpu is missing or too old, or there is no GPU.
    """
    import onnxruntime

    version = onnxruntime.__version__
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise UserError(
            f"an ort-cuda bundle needs onnxruntime-gpu, and the onnxruntime {version} installed here is the build for "
            f"the CPU: {INSTALL_GPU_BUILD}."
        )
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_GPU_BUILD:
        raise UserError(
            f"an ort-cuda bundle needs onnxruntime-gpu 1.31 or newer, and {version} is installed: {INSTALL_GPU_BUILD}."
        )
    gpu = local_gpu()
    if gpu is None:
        raise UserError(
            "an ort-cuda bundle needs an NVIDIA GPU, and no driver or no GPU is visible here; check nvidia-smi, or "
            "export the checkpoint with --target ort-cpu."
        )
    # CUDA's own libraries, where they were installed with pip. What this prints, and what ONNX Runtime logs of a
    # provider that cannot find one of them, goes nowhere: require_provider says it in a sentence.
    onnxruntime.set_default_logger_severity(_FATAL)
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls(directory="")
    return f"onnxruntime {version} on {gpu.name} (SM {gpu.sm})"


def require_provider(wanted: str, found: list[str]) -> None:
    """Refuse a session that ONNX Runtime made with the providers ``found``, the first of which is not ``wanted``.

    Raises:
        UserError: the provider did not load, and ONNX Runtime went on with the next one.
    """
    if found[0] != wanted:
        raise UserError(
            f"ONNX Runtime could not load its {wanted}: the libraries of CUDA 13 (cuBLAS, cuRAND, cudart) and cuDNN 9 "
            "have to be installed; pip install 'onnxruntime-gpu[cuda,cudnn]' brings them."
        )
