"""The two architectures: small, but with every feature of their big relatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from tiny.tokenizer import CHAT_END, END_OF_TEXT, token_id

MAX_POSITIONS = 2048


@dataclass(frozen=True)
class Recipe:
    """How one model is made, trained (``learning_rate``) and cut into files."""

    build: Callable[[Tokenizer], PreTrainedModel]
    learning_rate: float
    shard_size: str


def build_dense(tokenizer: Tokenizer) -> PreTrainedModel:
    """Qwen2 with eight query heads over two key/value heads and a vocabulary projection tied to the embedding."""
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        max_window_layers=3,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=token_id(tokenizer, END_OF_TEXT),
        eos_token_id=token_id(tokenizer, CHAT_END),
    )
    return Qwen2ForCausalLM(config)


def build_moe(tokenizer: Tokenizer) -> PreTrainedModel:
    """Qwen2-MoE with sixteen experts, four a token, weights not renormalized, and a gated shared expert."""
    config = Qwen2MoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.01,
        max_position_embeddings=MAX_POSITIONS,
        max_window_layers=3,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=token_id(tokenizer, END_OF_TEXT),
        eos_token_id=token_id(tokenizer, CHAT_END),
    )
    model = Qwen2MoeForCausalLM(config)
    # A loop over experts is the fastest of transformers' implementations on a CPU at this size.
    model.set_experts_implementation("eager")
    return model


RECIPES = {
    "dense": Recipe(build_dense, learning_rate=2e-3, shard_size="8MB"),
    "moe": Recipe(build_moe, learning_rate=2e-3, shard_size="4MB"),
}


def round_to_bfloat16(model: PreTrainedModel) -> None:
    """Round every weight, in place, to what its bfloat16 file will hold; the arithmetic stays in float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
