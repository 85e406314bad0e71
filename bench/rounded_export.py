"""Quantized bundles of a random checkpoint for speed: weights rounded to nearest, no calibration, no gate.

The graphs are those of a calibrated export with the same number formats: lowering and writing are the product's own.
Accuracy of random weights would say nothing, which is why none is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from qwenforge.bundle_writer import BundleWriter
from qwenforge.engine.bundle_facts import bundle_facts
from qwenforge.engine.cpu_kernels import choose_kernels
from qwenforge.engine.ort_cpu_graphs import Optimize, lower_quantized, save_graphs
from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import rounded
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.instantiate import instantiate
from qwenforge.exporter.trace import trace
from qwenforge.exporter.weights import dims
from qwenforge.graph_passes.infra import add_initializer
from qwenforge.graph_passes.pipeline import optimize
from qwenforge.graph_passes.quantize.sites import find_sites
from qwenforge.manifest import Kernels, Limits

_FORMATS: dict[int, Literal["int8", "int4"]] = {8: "int8", 4: "int4"}


@dataclass(frozen=True)
class Rounding:
    """Number formats of a bundle.

    Attributes:
        bits: of the weights of layers, 4 or 8.
        group_size: columns that share a scale; None for a whole row.
        head_bits: of the vocabulary projection, and of the embedding where the two are tied.
        head_group_size: likewise.
        expert_group: likewise of routed experts, where it is not that of the layers.
    """

    bits: int
    group_size: int | None
    head_bits: int
    head_group_size: int | None
    expert_group: int | None = None


def export_rounded(
    checkpoint: Path,
    bundle: Path,
    rounding: Rounding,
    *,
    optimized_for: Optimize,
    kernels: Kernels | None = None,
    cache: Literal["fp32"] | None = None,
) -> Path:
    """Write the ort-cpu bundle ``bundle``, in place of one that is there; returns it.

    ``kernels`` and ``cache`` are those of an export (:func:`~qwenforge.engine.cpu_kernels.choose_kernels`).
    """
    record = choose_kernels(kernels, cache=cache, target="ort-cpu", dtype="fp32", weight_only=True)
    assert record is not None
    source = Checkpoint.open(checkpoint)
    traced = trace(source, ir.DataType.FLOAT)
    limits = Limits(max_length=2048, max_batch=None)
    portable = instantiate(optimize(traced.model, positions=limits.max_length).model, traced, source)
    round_weights(portable, rounding)
    with BundleWriter(bundle) as writer:
        graphs = lower_quantized(portable, optimized_for, kernels=record.kernels, cache=record.cache)
        saved = save_graphs(graphs, writer.directory)
        for name, path in source.tokenizer_files.items():
            writer.add_file(path, name)
        facts = bundle_facts(source, graphs.decode, "ort-cpu", "fp32", "copy", limits, None)
        record = record.model_copy(update={"cache": graphs.cache})
        facts = facts.model_copy(
            update={"ort_cpu": record, "prefill": graphs.record, "session_options": graphs.session_options}
        )
        return writer.commit(facts, known_sha256={file.path.name: file.sha256 for file in saved.files})


def round_weights(model: ir.Model, rounding: Rounding) -> None:
    """Make every matrix but routers and gates of shared experts one of codes, in place; nothing is read."""
    sites = find_sites(model)
    for site in sites.linear.values():
        if site.role in ("router", "shared_gate"):
            continue
        head = site.role == "vocabulary"
        bits, group = (rounding.head_bits, rounding.head_group_size) if head else (rounding.bits, rounding.group_size)
        matrix = weights.transpose(site.weight, (1, 0))
        stored = rounded(matrix, _FORMATS[bits], group or dims(matrix)[1])
        codes = add_initializer(model, f"{site.name}.weight", weights.transpose(stored.dequantized(), (1, 0)))
        site.node.replace_input_with(1, codes)
    for experts in sites.experts.values():
        for index, part in ((2, "gate_up"), (3, "down")):
            value = experts.node.inputs[index]
            assert value is not None and value.const_value is not None
            matrices = value.const_value
            stored = rounded(
                matrices, _FORMATS[rounding.bits], rounding.expert_group or rounding.group_size or dims(matrices)[2]
            )
            codes = add_initializer(model, f"{experts.name}.{part}", stored.dequantized())
            experts.node.replace_input_with(index, codes)
