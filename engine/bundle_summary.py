"""The manifest of a bundle as a reader wants it: a few titled tables of names and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from qwenforge.engine.cpu_library import LIBRARY
from qwenforge.engine.units import size, thousands
from qwenforge.manifest import (
    CHECKPOINT_RECIPE,
    EngineRecord,
    Kernels,
    LoweringRecord,
    Manifest,
    OrtCpuRecord,
    OrtCudaRecord,
    QuantizationRecord,
)

KERNELS_OF: Mapping[Kernels, str] = MappingProxyType(
    {"qwenforge": f"qwenforge's ({LIBRARY})", "onnxruntime": "ONNX Runtime's"}
)
"""Whose kernels, as reports say it."""


def summarize_bundle(manifest: Manifest) -> list[tuple[str, list[tuple[str, str]]]]:
    """What a reader wants of the manifest: titled tables of names and values."""
    source, model, limits = manifest.source, manifest.model, manifest.limits
    heads = (
        f"{model.num_attention_heads} for queries, {model.num_key_value_heads} for keys and values, of {model.head_dim}"
    )
    geometry = [("layers", str(model.num_hidden_layers)), ("hidden size", str(model.hidden_size)), ("heads", heads)]
    if model.num_experts is not None:
        geometry.append(("experts", f"{model.num_experts}, {model.num_experts_per_tok} per token"))
    geometry.append(("vocabulary", thousands(model.vocab_size)))
    files = [(name, size(record.bytes)) for name, record in manifest.files.items()]
    files += [
        (name, f"{size(record.bytes)}, shared with the checkpoint") for name, record in manifest.linked_files.items()
    ]
    return [
        (
            "export",
            [
                ("source", f"{source.path_name} ({source.model_type}, {source.dtype})"),
                ("target", f"{manifest.target}, {manifest.dtype}"),
                ("context", f"{thousands(limits.max_length)} tokens"),
                ("batch", "any" if limits.max_batch is None else f"at most {limits.max_batch}"),
                ("created", manifest.created),
                ("by", f"qwenforge {manifest.qwenforge_version}"),
            ],
        ),
        ("model", geometry),
        ("verification", _verification(manifest)),
        ("files", files),
        *([("lowering", _lowering(manifest.lowering))] if manifest.lowering is not None else []),
        *([("lowering", _ort_cuda(manifest.ort_cuda))] if manifest.ort_cuda is not None else []),
        *([("lowering", _ort_cpu(manifest.ort_cpu))] if manifest.ort_cpu is not None else []),
        *([("quantization", _quantization(manifest.quantization))] if manifest.quantization is not None else []),
        *([("engine", summarize_engine(manifest.engine))] if manifest.engine is not None else []),
    ] + ([("tools", list(manifest.tool_versions.items()))] if manifest.tool_versions else [])


def _lowering(record: LoweringRecord) -> list[tuple[str, str]]:
    """What a TensorRT graph was lowered for."""
    return [
        ("device", f"{record.device} (SM {record.sm})" if record.device else "every one of TensorRT for RTX"),
        ("TensorRT", record.tensorrt),
        ("attention", record.attention),
        ("experts", record.moe),
        ("weights as", record.weights_as),
    ]


def _quantization(record: QuantizationRecord) -> list[tuple[str, str]]:
    """How a model is quantized and what that cost."""
    sites = ", ".join(
        f"{group.sites} {group.weight}" + (f" in groups of {group.group_size}" if group.group_size else "")
        for group in record.sites
    )
    inputs: Counter[str] = Counter()
    for group in record.sites:
        inputs[group.activation or "as the model's"] += group.sites
    rows = [
        ("recipe", "the checkpoint's own" if record.recipe == CHECKPOINT_RECIPE else record.recipe),
        ("sites", sites),
        ("their inputs", ", ".join(f"{count} {kind}" for kind, count in inputs.most_common())),
        ("cache", record.cache or "as the model's"),
    ]
    if record.recipe != CHECKPOINT_RECIPE:
        rows.append(("calibrated on", record.calibrated_on or "no text"))
    if record.judged_on is None:
        return rows
    accuracy, budget = record.accuracy, record.budget
    return [
        *rows,
        ("judged on", record.judged_on),
        ("mean KL", f"{accuracy['mean_kl']:.3g} nats (budget {budget['kl']:g})"),
        ("perplexity", f"{accuracy['perplexity_ratio']:.4f} times the unquantized (budget {budget['ppl']:g})"),
        ("best token agrees", f"{accuracy['top1_agreement']:.1%} (budget {budget['top1']:.1%})"),
    ]


def _ort_cuda(record: OrtCudaRecord) -> list[tuple[str, str]]:
    """What an ort-cuda graph is made of."""
    return [
        ("device", f"any; chosen for {record.device} (SM {record.sm})" if record.device else "any"),
        ("attention", record.attention),
        ("experts", record.moe),
        ("chosen by", record.basis),
    ]


def _ort_cpu(record: OrtCpuRecord) -> list[tuple[str, str]]:
    """Whose kernels compute an ort-cpu graph's quantized weights."""
    return [("kernels", KERNELS_OF[record.kernels]), ("chosen by", record.basis), ("cache", record.cache)]


def summarize_engine(record: EngineRecord) -> list[tuple[str, str]]:
    """What an engine was built for, and how."""
    rows = [
        ("file", record.file),
        ("device", f"{record.device} (SM {record.sm})" if record.device else "every one of TensorRT for RTX"),
        ("built by", f"{record.module} {record.tensorrt}"),
        ("CUDA of the driver", record.driver or "built without a GPU"),
        ("plugin library", record.plugin_library or "none"),
        ("layers", str(record.layers)),
        ("took", f"{record.build_seconds:.1f} s, {_memory(record.peak_build_bytes)}"),
    ]
    for profile in record.profiles:
        typical, most = (" x ".join(map(str, shapes["input_ids"])) for shapes in (profile.typical, profile.maximum))
        rows.append((f"profile {profile.name}", f"tuned for {typical} tokens, up to {most}"))
    rows += [
        (name.replace("_", " "), str(value)) for name, value in record.options.items() if value not in (None, False)
    ]
    return rows


def _memory(peak: int | None) -> str:
    return "memory not measured" if peak is None else f"{size(peak)} of memory"


def _verification(manifest: Manifest) -> list[tuple[str, str]]:
    record = manifest.verification
    if not record.performed:
        return [("performed", "no (--no-verify)")]
    rows: list[tuple[str, object]] = [
        ("performed", f"yes, {record.method}"),
        ("reference", record.reference),
        ("prompts", record.prompts),
        ("greedy tokens each", record.new_tokens),
        ("greatest logit error", None if record.max_abs_error is None else f"{record.max_abs_error:.2g}"),
        ("bound", None if record.bound is None else f"{record.bound:.2g}"),
        ("KL divergence", None if record.kl is None else f"{record.kl:.2g} nats"),
        ("greedy tokens agree", None if record.greedy_match is None else "yes" if record.greedy_match else "no"),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]
