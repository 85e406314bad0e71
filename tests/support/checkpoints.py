"""Small random Hugging Face checkpoints, written through transformers, safetensors and tokenizers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

Kind = Literal["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]

_DENSE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 256,
}
_SPARSE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": _DENSE,
    "qwen2_moe": _DENSE | _SPARSE | {"shared_expert_intermediate_size": 80},
    "qwen3": _DENSE | {"head_dim": 24},
    "qwen3_moe": _DENSE | _SPARSE | {"head_dim": 24},
}
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_checkpoint(
    path: str | Path,
    kind: Kind = "qwen2",
    *,
    seed: int = 0,
    dtype: str = "float32",
    layout: Literal["per_expert", "stacked"] = "per_expert",
    shards: int = 1,
    tokenizer: bool = True,
    **config_overrides: Any,
) -> Path:
    """Write a checkpoint folder and return its path.

    Matrices are normal with standard deviation 1.6 / sqrt(inputs) (0.2 at hidden size 64), norm weights near 1 and
    biases random, so that logits vary and every tensor matters. ``layout`` says whether the experts' tensors are
    separate, as in the official checkpoints, or stacked, as in transformers' modules. ``config_overrides`` are fields
    of transformers' configuration class (``rope_scaling={...}``, ``tie_word_embeddings=True``...).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(kind, **(_DEFAULTS[kind] | config_overrides))
    config.dtype = dtype
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.1 * value
        elif value.dim() > 1:
            value *= 1.6 / value.shape[-1] ** 0.5
        else:
            value *= 0.2
        state[name] = value.to(getattr(torch, dtype))
    if layout == "per_expert":
        state = _separate_experts(state)
    _write_shards(folder, state, shards)
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 256, "eos_token_id": [257, 256], "pad_token_id": 256, "do_sample": False}, indent=2)
    )
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer: tokens 0..255 are single bytes, 256.. the special tokens, no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_SPECIAL_TOKENS[0],
        eos_token=_SPECIAL_TOKENS[1],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _separate_experts(state: dict[str, Any]) -> dict[str, Any]:
    """Stacked expert tensors as one tensor a projection and expert, under the official names."""
    separate: dict[str, Any] = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up|down)_proj", name)
        if match is None:
            separate[name] = value
            continue
        for index, expert in enumerate(value):
            prefix = f"{match[1]}.{index}"
            if match[2] == "down":
                separate[f"{prefix}.down_proj.weight"] = expert.contiguous()
            else:
                gate, up = expert.chunk(2, dim=0)
                separate[f"{prefix}.gate_proj.weight"] = gate.contiguous()
                separate[f"{prefix}.up_proj.weight"] = up.contiguous()
    return separate


def _write_shards(folder: Path, state: dict[str, Any], shards: int) -> None:
    from safetensors.torch import save_file

    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.numel() * value.element_size() for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
