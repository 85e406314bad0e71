"""The tensors a checkpoint of a given architecture must have, under the official names."""

from __future__ import annotations

import re
from typing import Literal

from qwenforge.exporter.config import ModelConfig

Shape = tuple[int, ...]
ExpertLayout = Literal["per_expert", "stacked"]

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_HEAD = "lm_head.weight"

_IGNORED = re.compile(r".*\brotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)")


def is_ignored(name: str) -> bool:
    """Whether a stored tensor is a buffer that older software saved and everybody recomputes."""
    return _IGNORED.fullmatch(name) is not None


def expected_tensors(config: ModelConfig, layout: ExpertLayout = "per_expert") -> dict[str, Shape]:
    """Every tensor's name and shape, in the order of the forward pass.

    ``layout`` says whether experts are separate tensors, as in the official checkpoints, or stacked:
    ``mlp.experts.gate_up_proj`` [E, 2I, C] and ``mlp.experts.down_proj`` [E, C, I], as in transformers' modules.
    With tied embeddings the output head is listed too, though a checkpoint may lack it.
    """
    hidden = config.hidden_size
    tensors: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer, kind in enumerate(config.layer_kinds):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors |= _attention(config, f"{prefix}.self_attn")
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        if kind.sparse:
            tensors |= _experts(config, f"{prefix}.mlp", layout)
        else:
            tensors |= _feed_forward(f"{prefix}.mlp", hidden, config.intermediate_size)
    tensors["model.norm.weight"] = (hidden,)
    tensors[OUTPUT_HEAD] = (config.vocab_size, hidden)
    return tensors


def _attention(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    tensors: dict[str, Shape] = {}
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        tensors[f"{prefix}.{name}.weight"] = (rows, hidden)
        if config.qkv_bias:
            tensors[f"{prefix}.{name}.bias"] = (rows,)
    if config.qk_norm:
        tensors[f"{prefix}.q_norm.weight"] = (config.head_dim,)
        tensors[f"{prefix}.k_norm.weight"] = (config.head_dim,)
    tensors[f"{prefix}.o_proj.weight"] = (hidden, queries)
    if config.output_bias:
        tensors[f"{prefix}.o_proj.bias"] = (hidden,)
    return tensors


def _feed_forward(prefix: str, hidden: int, inner: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def _experts(config: ModelConfig, prefix: str, layout: ExpertLayout) -> dict[str, Shape]:
    count, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    tensors: dict[str, Shape] = {f"{prefix}.gate.weight": (count, hidden)}
    if layout == "stacked":
        tensors[f"{prefix}.experts.gate_up_proj"] = (count, 2 * inner, hidden)
        tensors[f"{prefix}.experts.down_proj"] = (count, hidden, inner)
    else:
        for expert in range(count):
            tensors |= _feed_forward(f"{prefix}.experts.{expert}", hidden, inner)
    if config.shared_expert_intermediate_size:
        tensors |= _feed_forward(f"{prefix}.shared_expert", hidden, config.shared_expert_intermediate_size)
        tensors[f"{prefix}.shared_expert_gate.weight"] = (1, hidden)
    return tensors
