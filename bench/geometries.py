"""Checkpoints of real geometries with random weights: ``python -m qwenforge.bench.geometries 0.5b -o DIR``.

Speed and memory do not depend on the values, so nothing needs to be downloaded to measure them. The weights are drawn
and written block by block: memory stays below 200 MB whatever the geometry.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qwenforge.engine.planning.known_models import CONFIGS
from qwenforge.errors import UserError
from qwenforge.exporter.config import ModelConfig
from qwenforge.exporter.expected_tensors import OUTPUT_HEAD, expected_tensors

EXAMPLE = "python -m qwenforge.bench.geometries 0.5b -o /tmp/qwen2-0.5b --dtype bf16"

_QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
_OFFICIAL = _QWEN2 | {"vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0}


def _official(model: str) -> dict[str, Any]:
    """The config that ships with the package, with the tokens that end a text in the byte tokenizer."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{model}.json").read_text(encoding="utf-8"))
    return config | {"bos_token_id": 256, "eos_token_id": 257}


GEOMETRIES: dict[str, dict[str, Any]] = {
    "0.5b": _OFFICIAL
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": _OFFICIAL
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "7b": _official("qwen2-7b"),
    "moe-a2.7b": _official("qwen1.5-moe-a2.7b"),
    "tiny": _QWEN2
    | {
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
GEOMETRIES["tiny-moe"] = (
    _official("qwen1.5-moe-a2.7b")
    | GEOMETRIES["tiny"]
    | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
    }
)
GEOMETRIES["moe-0.7b"] = _official("qwen1.5-moe-a2.7b") | {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 704,
    "shared_expert_intermediate_size": 2816,
}
"""config.json by name: Qwen2-0.5B, 1.5B and 7B, Qwen1.5-MoE-A2.7B, five narrow layers of its kind with 0.7 billion
parameters, and tiny ones to try the tools out."""

SEED = 0
STANDARD_DEVIATION = 0.02
"""Of every weight around 0 (norms: around 1), as transformers initializes these models."""

Draw = Callable[[int, float], Iterator[npt.NDArray[Any]]]
"""Gives so many numbers around a mean, block by block, in the stored dtype or one to be rounded to it."""

_BLOCK = 1 << 22
_TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_STORED: dict[str, tuple[str, npt.DTypeLike]] = {
    "fp32": ("F32", np.float32),
    "fp16": ("F16", np.float16),
    "bf16": ("BF16", ml_dtypes.bfloat16),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qwenforge.bench.geometries",
        description="Write a checkpoint with the geometry of an official model and random weights, the same ones each "
        "time, with a tokenizer of single bytes. A folder that holds it already is left as it is.",
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("geometry", choices=list(GEOMETRIES), help="whose geometry")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument("--dtype", choices=list(_STORED), default="bf16", help="of the stored weights (default: bf16)")
    args = parser.parse_args(arguments)
    try:
        write_checkpoint(args.output, args.geometry, dtype=args.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_checkpoint(
    folder: Path, geometry: str, *, dtype: str = "fp32", layers: int | None = None, draw: Draw | None = None
) -> Path:
    """Write config, weights and a byte tokenizer to ``folder`` unless they are there already; returns ``folder``.

    Args:
        folder: the checkpoint's folder.
        geometry: a name in :data:`GEOMETRIES`.
        dtype: of the stored weights: ``fp32``, ``fp16`` or ``bf16``.
        layers: so many in the place of all.
        draw: other numbers, from something faster than NumPy.

    Raises:
        UserError: the folder cannot be written, or holds a checkpoint of somebody else.
    """
    config = geometry_config(geometry, dtype, layers)
    written = folder / "config.json"
    try:
        if written.is_file() and written.read_text() == _as_text(config):
            return folder
        if written.exists() and not _is_ours(written):
            raise UserError(f"{folder} holds another checkpoint, which would be overwritten; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        written.unlink(missing_ok=True)
        _write_weights(folder / "model.safetensors", tensor_shapes(config), dtype, draw or _drawn())
        _write_tokenizer(folder)
        generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": [config["eos_token_id"]]}
        (folder / "generation_config.json").write_text(_as_text(generation))
        written.write_text(_as_text(config))  # last: it says that the folder is complete
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    return folder


def geometry_config(geometry: str, dtype: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json that :func:`write_checkpoint` writes for these arguments."""
    config = GEOMETRIES[geometry] | {"torch_dtype": _TORCH_NAMES[dtype]}
    return config if layers is None else config | {"num_hidden_layers": layers}


def _is_ours(config: Path) -> bool:
    """Whether :func:`write_checkpoint` wrote this config.json, for whatever geometry and dtype."""
    if not config.is_file():
        return False
    try:
        found = json.loads(config.read_text(errors="replace"))
    except json.JSONDecodeError:
        return False
    if not isinstance(found, dict) or found.pop("torch_dtype", None) not in _TORCH_NAMES.values():
        return False
    layers = {"num_hidden_layers": found.get("num_hidden_layers")}
    return any(found == known | layers for known in GEOMETRIES.values())


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that a checkpoint of this config has, under the official names."""
    parsed = ModelConfig.parse(config, where="a geometry's config.json")
    shapes = expected_tensors(parsed)
    if parsed.tie_word_embeddings:
        del shapes[OUTPUT_HEAD]
    return shapes


def _write_weights(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, draw: Draw) -> None:
    """A .safetensors file: the header's length in 8 bytes, the header in JSON, the tensors' bytes in its order."""
    tag, kind = _STORED[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(kind).itemsize
        header[name] = {"dtype": tag, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, shape in shapes.items():
            for block in draw(math.prod(shape), 1.0 if name.endswith("norm.weight") else 0.0):
                file.write(block.astype(kind, copy=False).view(np.uint8).data)


def _drawn() -> Draw:
    generator = np.random.default_rng(SEED)

    def blocks(count: int, mean: float) -> Iterator[npt.NDArray[np.float32]]:
        for start in range(0, count, _BLOCK):
            block = generator.standard_normal(min(_BLOCK, count - start), dtype=np.float32)
            block *= STANDARD_DEVIATION
            block += mean
            yield block

    return blocks


def _write_tokenizer(folder: Path) -> None:
    """Byte-level: tokens 0..255 are single bytes, then the special tokens; no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(_as_text(settings))


def _as_text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
