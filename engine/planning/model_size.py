"""How many parameters a model has, and how much a step computes and reads, from its configuration alone.

Shapes are those of the checkpoint's tensors (:mod:`qwenforge.exporter.expected_tensors`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwenforge.exporter.config import ModelConfig
from qwenforge.exporter.expected_tensors import EMBEDDING, OUTPUT_HEAD, expected_tensors


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by what becomes of them when weights are quantized and when a token is computed.

    Attributes:
        embedding: the token table, of which a token reads one row.
        head: the vocabulary projection, whether tied to the embedding or not.
        tied: the head is the embedding, stored once.
        dense: matrices that every token is multiplied by: attention, dense and shared feed-forward layers.
        experts: matrices of all routed experts.
        other: norms, biases, routers and shared expert gates, which stay in 16 bits.
        largest: elements of the largest tensor of an export, a layer's experts being one.
    """

    embedding: int
    head: int
    tied: bool
    dense: int
    experts: int
    other: int
    largest: int

    @property
    def total(self) -> int:
        """What is stored."""
        return self.embedding + (0 if self.tied else self.head) + self.dense + self.experts + self.other


def count_parameters(config: ModelConfig) -> Parameters:
    """The counts for ``config``."""
    dense = experts = other = 0
    for name, shape in expected_tensors(config).items():
        size = math.prod(shape)
        if name in (EMBEDDING, OUTPUT_HEAD):
            continue
        if ".mlp.experts." in name:
            experts += size
        elif name.endswith("_proj.weight"):
            dense += size
        else:
            other += size
    vocabulary = config.vocab_size * config.hidden_size
    stacked = (2 * config.num_experts * config.moe_intermediate_size) * config.hidden_size
    widest = 2 * max(config.intermediate_size, config.shared_expert_intermediate_size) * config.hidden_size
    return Parameters(
        embedding=vocabulary,
        head=vocabulary,
        tied=config.tie_word_embeddings,
        dense=dense,
        experts=experts,
        other=other,
        largest=max(vocabulary, stacked, widest),
    )


def experts_read(config: ModelConfig, tokens: int) -> float:
    """Fraction of the routed experts' weights that ``tokens`` tokens read, choosing evenly and independently.

    Of E experts a token misses all but K; the expected fraction hit by T tokens is 1 - (1 - K/E)^T.
    """
    if not config.num_experts:
        return 0.0
    return 1.0 - (1.0 - config.num_experts_per_tok / config.num_experts) ** tokens


def cache_bytes_per_token(config: ModelConfig, element_bytes: float) -> float:
    """Keys and values of one token in all layers: 2 * layers * Hk * D elements."""
    heads = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * heads * element_bytes


def matrix_operations(config: ModelConfig, parameters: Parameters, tokens: int, projected: int) -> float:
    """Multiplications and additions of ``tokens`` tokens by the weights, ``projected`` of them onto the vocabulary."""
    share = config.num_experts_per_tok / config.num_experts if config.num_experts else 0.0
    per_token = parameters.dense + parameters.experts * share + parameters.other
    return 2.0 * (tokens * per_token + projected * parameters.head)


def attention_operations(config: ModelConfig, rows: int, new: int, past: int) -> float:
    """Multiplications and additions of scores and weighted sums: each of ``new`` queries sees the past and itself.

    4 * Hq * D a pair of query and key, in every layer; sliding windows are not counted as a saving.
    """
    pairs = rows * (new * past + new * (new + 1) / 2)
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
