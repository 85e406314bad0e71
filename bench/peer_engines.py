"""The engines of a comparison: ours and the peers that run a geometry at a number of bits, built and ready to start."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenforge.bench.geometries import GEOMETRIES
from qwenforge.bench.peers import genai, llama
from qwenforge.bench.rounded_export import Rounding, export_rounded
from qwenforge.engine.ort_cpu_graphs import Optimize
from qwenforge.manifest import Kernels

BITS = (32, 8, 4)
OURS = "qwenforge"
MAX_LENGTH = 2048

_ORT = "ONNX Runtime's kernels"

_ROUNDINGS: dict[int, dict[str, tuple[Rounding, Optimize, Kernels]]] = {
    4: {
        OURS: (Rounding(4, 128, 4, 128), "latency", "qwenforge"),
        f"{OURS}, vocabulary of 8 bits": (Rounding(4, 128, 8, None), "latency", "qwenforge"),
        f"{OURS}, group 32": (Rounding(4, 32, 4, 32), "latency", "qwenforge"),
        f"{OURS}, {_ORT}": (Rounding(4, 128, 4, 128), "latency", "onnxruntime"),
        f"{OURS}, {_ORT}, one graph": (Rounding(4, 128, 4, 128), "memory", "onnxruntime"),
    },
    8: {
        OURS: (Rounding(8, None, 8, None), "latency", "qwenforge"),
        f"{OURS}, {_ORT}": (Rounding(8, None, 8, None), "latency", "onnxruntime"),
        f"{OURS}, {_ORT}, one graph": (Rounding(8, None, 8, None), "memory", "onnxruntime"),
    },
}
"""Our engines, by our own kernels where they are not said to be by ONNX Runtime's.

The vocabulary projection has 4 bits in onnxruntime-genai's int4 graphs, 6 or 8 in llama.cpp's q4_0.
"""

_SMALL_EXPERTS = 64
"""Group size of 4-bit experts that are no whole number of 128 columns wide."""


@dataclass(frozen=True)
class Start:
    """How to start an engine's worker; ``disk_bytes`` is what it loads from."""

    command: list[str | Path]
    arguments: dict[str, Any]
    disk_bytes: int


@dataclass(frozen=True)
class Builds:
    """What engines are built from and where.

    Attributes:
        checkpoint: the random checkpoint.
        folder: holds the builds.
        geometry: its name.
        threads: of each engine.
        genai_python, llama_python: interpreters of the peers' environments; None leaves a peer out.
    """

    checkpoint: Path
    folder: Path
    geometry: str
    threads: int
    genai_python: Path | None
    llama_python: Path | None


def supports_genai(geometry: str) -> bool:
    """onnxruntime-genai 0.18 refuses Qwen2-MoE."""
    return "num_experts" not in GEOMETRIES[geometry]


def engines(bits: int, builds: Builds, *, weights: str = "copy") -> dict[str, Start]:
    """Every engine by name, ours first; built where it is not there, ours always anew.

    Raises:
        UserError: an engine cannot be built.
    """
    found = _ours(bits, builds, weights)
    if builds.genai_python is not None and supports_genai(builds.geometry):
        for name, (precision, options) in _genai_builds(bits).items():
            target = builds.folder / name.replace(",", "").replace(" ", "-")
            model = genai.build(
                builds.genai_python,
                builds.checkpoint,
                target,
                threads=builds.threads,
                precision=precision,
                options=options,
            )
            arguments = {"model": str(model), "vocab_size": _vocabulary(builds)}
            found[name] = Start([builds.genai_python, genai.WORKER], arguments, _bytes(model))
    if builds.llama_python is not None:
        number_format: llama.Format = {32: "f16", 8: "q8_0", 4: "q4_0"}[bits]  # type: ignore[assignment]
        file = llama.build(builds.llama_python, builds.checkpoint, builds.folder / "gguf", number_format)
        arguments = {"model": str(file), "threads": builds.threads, "vocab_size": _vocabulary(builds)}
        found[f"llama.cpp {number_format}"] = Start([builds.llama_python, llama.WORKER], arguments, file.stat().st_size)
    return found


def _ours(bits: int, builds: Builds, weights: str) -> dict[str, Start]:
    bundles = {}
    if bits == 32:
        bundles[OURS] = _export(builds.checkpoint, builds.folder / f"qwenforge-{weights}", weights)
    else:
        for name, (rounding, optimized_for, kernels) in _ROUNDINGS[bits].items():
            words = re.sub(r"[^\w ]", "", name).replace(" ", "-")
            target = builds.folder / f"{words}-int{bits}"
            bundles[name] = export_rounded(
                builds.checkpoint,
                target,
                _fitting(rounding, builds.geometry),
                optimized_for=optimized_for,
                kernels=kernels,
            )
    worker: list[str | Path] = [sys.executable, "-m", "qwenforge.bench.worker"]
    return {
        name: Start(worker, {"bundle": str(bundle), "threads": builds.threads}, _bytes(bundle))
        for name, bundle in bundles.items()
    }


def _fitting(rounding: Rounding, geometry: str) -> Rounding:
    """``rounding`` with experts in groups that divide their width, as QMoE wants them."""
    width = GEOMETRIES[geometry].get("moe_intermediate_size")
    if width is None or rounding.group_size is None or width % rounding.group_size == 0:
        return rounding
    return Rounding(
        rounding.bits, rounding.group_size, rounding.head_bits, rounding.head_group_size, expert_group=_SMALL_EXPERTS
    )


def _export(checkpoint: Path, bundle: Path, weights: str) -> Path:
    from qwenforge.engine.export import export_checkpoint

    export_checkpoint(
        checkpoint, bundle, target="ort-cpu", dtype="fp32", weights=weights, max_length=MAX_LENGTH, verify_result=False
    )
    return bundle


def _genai_builds(bits: int) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Builds of onnxruntime-genai, all of which project the last token only, as everyone else does."""
    head = "prune_lm_head=true"
    name = "onnxruntime-genai"
    if bits == 32:
        return {name: ("fp32", ()), f"{name}, last-token head": ("fp32", (head,))}
    return {
        f"{name} int{bits} group {group}": (f"int{bits}", (head, f"block_size={group}", "accuracy_level=4"))
        for group in (32, 128)
    }


def _vocabulary(builds: Builds) -> int:
    return int(GEOMETRIES[builds.geometry]["vocab_size"])


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
