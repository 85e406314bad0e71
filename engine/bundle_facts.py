"""What a bundle's manifest records of a checkpoint and of the graph that was made of it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qwenforge.engine.session_choice import session_choice
from qwenforge.engine.verification import VerificationReport
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.manifest import BundleFacts, Geometry, Limits, Source, TensorSpec, Verification
from qwenforge.packages import installed_version

_TOOLS = ("onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch", "transformers")


def bundle_facts(
    source: Checkpoint,
    model: ir.Model,
    target: str,
    dtype: str,
    weights: str,
    limits: Limits,
    report: VerificationReport | None,
) -> BundleFacts:
    """The manifest's facts of ``model``, as lowered for ``target``; what only some targets have is added to them."""
    config = source.config
    generation = generation_config(source)
    eos = generation.get("eos_token_id", [token for token in config.eos_token_ids if token < config.vocab_size])
    sparse = config.num_experts or None
    return BundleFacts(
        source=Source(
            path_name=source.folder.resolve().name,
            model_type=config.model_type,
            config=dict(config.source),
            fingerprint=source.fingerprint(),
            dtype=_stored_dtype(source),
        ),
        target=target,
        dtype=dtype,
        weights="link" if weights == "link" else "copy",
        limits=limits,
        inputs=tuple(tensor_spec(value) for value in model.graph.inputs),
        outputs=tuple(tensor_spec(value) for value in model.graph.outputs),
        model=Geometry(
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            intermediate_size=config.intermediate_size,
            num_experts=sparse,
            num_experts_per_tok=config.num_experts_per_tok if sparse else None,
            moe_intermediate_size=config.moe_intermediate_size if sparse else None,
            shared_expert_intermediate_size=(config.shared_expert_intermediate_size or None) if sparse else None,
            max_position_embeddings=config.max_position_embeddings,
        ),
        verification=_verification(dtype, report),
        tool_versions=_tool_versions(),
        session_options=session_choice(target, model, weights),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        bos_token_id=generation.get("bos_token_id"),
        pad_token_id=generation.get("pad_token_id"),
    )


def generation_config(source: Checkpoint) -> dict[str, Any]:
    """The checkpoint's, without special tokens beyond the vocabulary: no model can choose them."""
    config = dict(source.generation_config)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        given = config.get(name)
        if isinstance(given, list):
            config[name] = [token for token in given if token < source.config.vocab_size]
        elif given is not None and given >= source.config.vocab_size:
            config[name] = None
    return config


def _tool_versions() -> dict[str, str]:
    return {name: installed_version(name) for name in _TOOLS}


def _verification(dtype: str, report: VerificationReport | None) -> Verification:
    if report is None:
        return Verification(performed=False)
    return Verification(
        performed=True,
        method="whole-model" if report.method == "whole-model" else "layer-by-layer",
        reference=reference_name(dtype),
        prompts=report.prompts,
        new_tokens=report.new_tokens,
        max_abs_error=report.max_abs_error,
        kl=report.max_kl,
        greedy_match=report.token_disagreements == 0 and report.near_ties == 0,
        bound=report.bound,
    )


def reference_name(dtype: str) -> str:
    """What a model in ``dtype`` is compared with."""
    return "transformers fp32" if dtype == "fp32" else f"transformers fp32, weights rounded to {dtype}"


def _stored_dtype(source: Checkpoint) -> str:
    """The dtype of most of the checkpoint's bytes, or how its weights are quantized."""
    if source.quantized is not None:
        return source.quantized.format.summary
    sizes: dict[str, int] = {}
    for tensor in map(source.tensor, source.names):
        name = tensor.dtype.numpy().name
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def tensor_spec(value: ir.Value) -> TensorSpec:
    """A graph's input or output as the manifest names it."""
    assert value.name is not None and value.dtype is not None and value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)
