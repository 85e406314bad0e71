"""A checkpoint of one decoder layer at the true width of a published model that takes no disk.

The weight matrices lie in holes of a sparse file, so that a layer of 3.5 GB is written in a millisecond; norms and
biases are random. The vocabulary is cut to 128 entries. In a graph whose matrices are engine inputs, a build never asks
for the values of what lies in the holes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qwenforge.engine.planning.known_models import CONFIGS

VOCABULARY = 128
_BYTES = {"BF16": 2, "F16": 2}


def sparse_checkpoint(folder: Path, model: str, *, dtype: str = "BF16", **changes: Any) -> Path:
    """Write one layer of ``model`` (a name that ``qwenforge plan`` knows) with ``changes`` to its configuration."""
    config = json.loads((CONFIGS / f"{model}.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1} | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _write_tensors(folder / "model.safetensors", _shapes(config), dtype)
    return folder


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of the official checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if ".mlp.experts." not in name:
            shapes[name] = tuple(value.shape)
            continue
        experts, rows, columns = value.shape
        prefix, kind = name.rsplit(".", 1)
        for index in range(experts):
            parts = {"down_proj": ["down_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}[kind]
            shapes |= {f"{prefix}.{index}.{part}.weight": (rows // len(parts), columns) for part in parts}
    return shapes


def _write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for name, shape in shapes.items():
            if len(shape) == 1:
                values = generator.normal(1, 0.1, shape).astype(np.float32)
                # The upper half of a float32 is its bfloat16.
                halves = values.view(np.uint32) >> 16 if dtype == "BF16" else values.astype(np.float16)
                file.seek(start + header[name]["data_offsets"][0])
                file.write(halves.astype(np.uint16 if dtype == "BF16" else np.float16).tobytes())
        file.truncate(start + offset)
