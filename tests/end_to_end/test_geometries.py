"""Checkpoints of many shapes, exported and generated from: every token must be the one transformers chooses.

The export verifies itself too; here its result is judged again by other means: transformers' own ``generate`` on the
checkpoint, prompt by prompt, against our runtime on all prompts in one batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwenforge
from qwenforge.bundle import Bundle
from qwenforge.engine.export import export_checkpoint
from qwenforge.engine.threads import single_threaded_torch
from support.checkpoints import make_checkpoint

NEW_TOKENS = 24
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2": {
        "as many kv heads as heads": {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80},
        "one kv head of seven": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56},
        "six heads over three": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 72},
        "one head of size 64": {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 64},
        "two layers of other sizes": {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 130},
        "one layer": {"num_hidden_layers": 1},
        "tied": {"tie_word_embeddings": True},
        "tied, bf16, shards": {"tie_word_embeddings": True, "dtype": "bfloat16", "shards": 3},
        "fp16 source": {"dtype": "float16"},
        "other theta and epsilon": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
        "yarn, old spelling": {"rope_scaling": YARN},
        "yarn, new spelling": {"rope_parameters": {**YARN, "rope_theta": 50000.0}},
        "window in the upper layers": {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
        "window everywhere": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
        "window set but off": {"use_sliding_window": False, "sliding_window": 3},
        "vocabulary larger than the tokenizer's": {"vocab_size": 1001},
    },
    "qwen2_moe": {
        "one expert a token": {"num_experts_per_tok": 1},
        "three experts a token, renormalized": {"num_experts_per_tok": 3, "norm_topk_prob": True},
        "seven of seven experts": {"num_experts": 7, "num_experts_per_tok": 7},
        "five of sixteen, stacked": {"num_experts": 16, "num_experts_per_tok": 5, "layout": "stacked"},
        "six of nine, bf16, shards": {"num_experts": 9, "num_experts_per_tok": 6, "dtype": "bfloat16", "shards": 4},
        "dense layers named": {"num_hidden_layers": 4, "mlp_only_layers": [0, 3]},
        "every second layer": {"num_hidden_layers": 4, "decoder_sparse_step": 2},
        "both": {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
        "tied, one kv head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
        "windowed": {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        "renormalized, yarn": {"norm_topk_prob": True, "rope_scaling": YARN},
        "two experts, fp16 source": {"num_experts": 2, "num_experts_per_tok": 2, "dtype": "float16"},
        "without bias": {"qkv_bias": False},
    },
    "qwen3": {
        "head size of its own": {"head_dim": 40},
        "tied, one kv head": {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 8},
        "with attention bias": {"attention_bias": True},
    },
    "qwen3_moe": {
        "not renormalized": {"norm_topk_prob": False, "num_experts_per_tok": 4},
        "renormalized, dense layers": {"norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]},
        "stacked, bf16": {"layout": "stacked", "dtype": "bfloat16", "num_experts": 8, "num_experts_per_tok": 7},
    },
}
CASES = [
    pytest.param(kind, config, id=f"{kind}: {name}")
    for kind, group in FAMILIES.items()
    for name, config in group.items()
]


def _prompts(vocab_size: int) -> list[list[int]]:
    generator = np.random.default_rng(11)
    return [generator.integers(0, min(256, vocab_size), length).tolist() for length in (1, 13, 6, 29)]


def _expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.inference_mode(), single_threaded_torch():
            whole = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        answers.append(whole[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_tokens_are_those_of_transformers(kind: Any, config: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", kind, seed=5, **config)
    report = export_checkpoint(folder, tmp_path / "bundle")
    assert report.verification is not None and report.verification.token_disagreements == 0
    prompts = _prompts(320)
    result = qwenforge.load(report.bundle).generate(
        prompts, max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True
    )
    assert result.tokens == _expected(folder, prompts)


def test_tied_configuration_with_another_head_stored_is_untied(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", "qwen2", seed=5)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    report = export_checkpoint(folder, tmp_path / "bundle")
    prompts = _prompts(320)
    result = qwenforge.load(report.bundle).generate(prompts, max_new_tokens=4, temperature=0.0, ignore_eos=True)
    assert result.tokens == [tokens[:4] for tokens in _expected(folder, prompts)]


def test_special_tokens_beyond_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", "qwen2", num_hidden_layers=1)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [151645, 257], "pad_token_id": 151643}))
    report = export_checkpoint(folder, tmp_path / "bundle")
    bundle = Bundle.open(report.bundle)
    assert bundle.manifest.eos_token_ids == (257,) and bundle.manifest.pad_token_id is None
    assert bundle.generation_config["eos_token_id"] == [257]
    path.write_text(json.dumps({"eos_token_id": 151645}))
    report = export_checkpoint(folder, tmp_path / "bundle")
    assert Bundle.open(report.bundle).manifest.eos_token_ids == ()
    qwenforge.load(report.bundle).generate("x", max_new_tokens=2)
