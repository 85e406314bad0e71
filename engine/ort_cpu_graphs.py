"""A quantized model's graphs for ONNX Runtime on a CPU: one for every step, or one for decode and one for prefill.

A step of one token reads every weight once and computes little: the fewest bits win. A step of many tokens computes:
int8 by int8 products win, twice as fast as those of 4-bit weights. ``latency`` therefore keeps both forms of the
weights, over one key/value cache; ``memory`` keeps one.

=========== ================================================== ==================================================
optimize    ``model.onnx``                                     ``prefill.onnx``
=========== ================================================== ==================================================
``latency`` products of blocks, 4 or 8 bits as planned         products of int8 rows by int8 activations, static
                                                               where they were calibrated, else by token
``memory``  int8 rows where activations were calibrated, else  none
            blocks
=========== ================================================== ==================================================

Where the plan still knows the weights as they were, the prefill graph's int8 rows are rounded from those and not from
their 4-bit codes. Experts, the vocabulary projection, embeddings and whatever else is equal in both graphs are stored
once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from qwenforge import names
from qwenforge.exporter import weights
from qwenforge.exporter.data_writer import Progress
from qwenforge.exporter.external_data import SaveReport, WrittenFile, save_model
from qwenforge.graph_passes.lower import lower
from qwenforge.manifest import MODEL_NAME, PREFILL_NAME, CpuCache, Kernels, PrefillRecord

Optimize = Literal["latency", "memory"]

PREFILL_TOKENS = 16
"""Tokens of a step from which on the prefill graph takes it."""

TWIN_NAME = ".verify-twin.onnx"
"""The same model by kernels that round no activations, beside the bundle's graphs while those are verified."""


@dataclass(frozen=True)
class CpuGraphs:
    """``decode`` is for every step; ``prefill``, where there is one, for steps of many tokens."""

    decode: ir.Model
    prefill: ir.Model | None

    @property
    def record(self) -> PrefillRecord | None:
        """The manifest's record of the prefill graph."""
        return PrefillRecord(file=PREFILL_NAME, minimum_tokens=PREFILL_TOKENS) if self.prefill is not None else None

    @property
    def session_options(self) -> dict[str, str]:
        """Session configuration of a bundle of these graphs.

        Two sessions take turns: the threads of the one that is done must not spin beside the other's. Prepacking is
        never turned off: MatMulNBits is some 60 times slower without.
        """
        return {"session.force_spinning_stop": "1"} if self.prefill is not None else {}

    @property
    def cache(self) -> CpuCache:
        """The type of the key/value caches, of which every one has the same."""
        first = next(value for value in self.decode.graph.inputs if value.name == names.past_key(0))
        return "fp16" if first.dtype == ir.DataType.FLOAT16 else "fp32"


@dataclass(frozen=True)
class SavedGraphs:
    """What :func:`save_graphs` wrote."""

    decode: SaveReport
    prefill: SaveReport | None

    @property
    def files(self) -> tuple[WrittenFile, ...]:
        """Every file."""
        return self.decode.files + (self.prefill.files if self.prefill is not None else ())


def lower_quantized(
    portable: ir.Model,
    optimize: Optimize = "latency",
    *,
    kernels: Kernels = "onnxruntime",
    cache: CpuCache = "fp32",
) -> CpuGraphs:
    """Lower ``portable``, a portable model to which a quantization plan was applied; nothing is read.

    ``portable`` becomes the decode graph. There is no prefill graph where it would have no product of integers, nor
    with our kernels, which are fast at both and to which ``optimize`` makes no difference. ``cache`` is for those: fp16
    where every attention of the graph is theirs (:attr:`CpuGraphs.cache` tells what came of it).

    Raises:
        UnsupportedError: weights are of a format for which ONNX Runtime has no kernel on a CPU.
    """
    if kernels == "qwenforge":
        return CpuGraphs(lower(portable, "ort-cpu", products="blocks", own_ops=True, half_caches=cache == "fp16"), None)
    if optimize == "memory":
        return CpuGraphs(lower(portable, "ort-cpu", products="static"), None)
    prefill = lower(portable.clone(), "ort-cpu", products="integers")
    decode = lower(portable, "ort-cpu", products="blocks")
    faster = any(node.op_type == "MatMulIntegerToFloat" for node in prefill.graph)
    return CpuGraphs(decode, prefill if faster else None)


def save_graphs(
    graphs: CpuGraphs, folder: Path, *, twin: ir.Model | None = None, progress: Progress | None = None
) -> SavedGraphs:
    """Write ``model.onnx`` and, where there is one, ``prefill.onnx`` into ``folder``, each with its data.

    An initializer of the prefill graph that the decode graph has refers to ``model.onnx.data``. The decode graph's
    initializers refer to the written file afterwards.

    Args:
        graphs: what to write.
        folder: where.
        twin: the same model by other kernels, written likewise to ``TWIN_NAME`` for as long as it is compared with.
        progress: told what is written.

    Raises:
        UserError: a file cannot be written or a weight cannot be read.
    """
    values = [value for value in graphs.decode.graph.initializers.values() if value.const_value is not None]
    keys = [weights.plan_key(value.const_value) for value in values if value.const_value is not None]
    decode = save_model(graphs.decode, folder / MODEL_NAME, progress=progress, replace=True)
    written = dict(zip(keys, (value.const_value for value in values), strict=True))
    shared: dict[str | os.PathLike[str], str] = (
        {decode.data.path: decode.data.path.name} if decode.data is not None else {}
    )

    def save_beside(model: ir.Model, name: str) -> SaveReport:
        for value in model.graph.initializers.values():
            if value.const_value is not None:
                value.const_value = written.get(weights.plan_key(value.const_value)) or value.const_value
        return save_model(model, folder / name, progress=progress, link=shared)

    if twin is not None:
        save_beside(twin, TWIN_NAME)
    return SavedGraphs(decode, save_beside(graphs.prefill, PREFILL_NAME) if graphs.prefill is not None else None)
