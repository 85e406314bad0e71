"""A checkpoint of a real model's geometry with random weights: speed and memory do not depend on the values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GEOMETRIES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
    },
}
"""Fields of config.json by name of the model; ``tiny`` is for trying the tools out."""


def write_random_checkpoint(folder: Path, geometry: str, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Write config, weights and a byte tokenizer to ``folder`` unless they are there already; returns ``folder``.

    Args:
        folder: the checkpoint's folder.
        geometry: a name in :data:`GEOMETRIES`.
        dtype: of the stored weights, as torch names it.
        seed: of the weights.
    """
    import torch
    from safetensors.torch import save_file

    config = GEOMETRIES[geometry] | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    written = folder / "config.json"
    if written.is_file() and json.loads(written.read_text()) == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in _shapes(config):
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        value = torch.randn(shape, generator=generator) * scale
        state[name] = (1 + value if "norm" in name else value).to(getattr(torch, dtype))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": [257]}))
    written.write_text(json.dumps(config, indent=1))  # last: it says that the folder is complete
    return folder


def _shapes(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kept = hidden // heads * config["num_key_value_heads"]
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (config["vocab_size"], hidden))]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for kind, width in (("q", hidden), ("k", kept), ("v", kept)):
            shapes += [(f"{at}.self_attn.{kind}_proj.weight", (width, hidden))]
            shapes += [(f"{at}.self_attn.{kind}_proj.bias", (width,))]
        shapes += [(f"{at}.self_attn.o_proj.weight", (hidden, hidden))]
        shapes += [(f"{at}.mlp.{kind}_proj.weight", (inner, hidden)) for kind in ("gate", "up")]
        shapes += [(f"{at}.mlp.down_proj.weight", (hidden, inner))]
        shapes += [(f"{at}.{norm}_layernorm.weight", (hidden,)) for norm in ("input", "post_attention")]
    return [*shapes, ("model.norm.weight", (hidden,))]


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
