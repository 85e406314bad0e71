"""A small, valid bundle without a model worth running: for tests of the bundle format itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qwenforge import names
from qwenforge.bundle import BundleFacts, BundleWriter, ReferenceLogits
from qwenforge.manifest import Geometry, Limits, Source, TensorSpec, Verification, checksum

VOCAB_SIZE = 40
LAYERS = 2


def bundle_facts(**changes: Any) -> BundleFacts:
    """Facts of a two-layer model, with ``changes`` to its fields."""
    cache = (names.BATCH, 1, names.CAPACITY, 8)
    pasts = [name(layer) for layer in range(LAYERS) for name in (names.past_key, names.past_value)]
    presents = [name(layer) for layer in range(LAYERS) for name in (names.present_key, names.present_value)]
    tokens = (names.BATCH, names.SEQUENCE)
    inputs = [
        TensorSpec(name=names.INPUT_IDS, dtype="int64", shape=tokens),
        TensorSpec(name=names.POSITION_IDS, dtype="int64", shape=tokens),
        TensorSpec(name=names.CACHE_POSITION, dtype="int64", shape=(names.BATCH,)),
        TensorSpec(name=names.LOGITS_INDEX, dtype="int64", shape=(names.BATCH, names.LOGITS_COUNT)),
        *(TensorSpec(name=name, dtype="float32", shape=cache) for name in pasts),
    ]
    outputs = [
        TensorSpec(name=names.LOGITS, dtype="float32", shape=(names.BATCH, names.LOGITS_COUNT, VOCAB_SIZE)),
        *(TensorSpec(name=name, dtype="float32", shape=cache) for name in presents),
    ]
    fields: dict[str, Any] = {
        "source": Source(
            path_name="tiny",
            model_type="qwen2",
            config={"hidden_size": 16, "rope_theta": 1e6},
            fingerprint="ab" * 32,
            dtype="bfloat16",
        ),
        "target": "ort-cpu",
        "dtype": "fp32",
        "limits": Limits(max_length=64),
        "inputs": inputs,
        "outputs": outputs,
        "model": Geometry(
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            hidden_size=16,
            vocab_size=VOCAB_SIZE,
        ),
        "verification": Verification(performed=True, method="whole-model", max_abs_error=1e-5, kl=0.0, bound=2e-4),
        "tool_versions": {"onnx": "1.23.0"},
        "eos_token_ids": [1],
    }
    return BundleFacts(**{**fields, **changes})


def reference_logits(seed: int = 0) -> ReferenceLogits:
    """References of a three-token prompt at two positions."""
    logits = np.random.default_rng(seed).standard_normal((2, VOCAB_SIZE)).astype(np.float32)
    return ReferenceLogits.from_logits([3, 1, 4], [1, 2], logits, greedy_tokens=[5], top=8)


def write_bundle(out: Path, *, model: bytes = b"model", data: bytes = b"weights" * 100, **changes: Any) -> Path:
    """Write a bundle whose graph and weights are just the bytes given; returns its path."""
    with BundleWriter(out) as writer:
        (writer.directory / "model.onnx").write_bytes(model)
        (writer.directory / "model.onnx.data").write_bytes(data)
        writer.add_text("tokenizer.json", "{}")
        writer.add_json("tokenizer_config.json", {"eos_token": "</s>"})
        writer.add_text("chat_template.jinja", "{{ messages }}")
        writer.add_json("generation_config.json", {"top_k": 20})
        writer.add_accuracy({"max_abs_error": 1e-5}, [reference_logits()])
        return writer.commit(bundle_facts(**changes))


def edit_manifest(bundle: Path, edit: Any, *, sign: bool = True) -> None:
    """Apply ``edit(fields)`` to the manifest in place; ``sign`` renews its checksum, as a forger would."""
    path = bundle / "manifest.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    stated = fields.pop("checksum")
    fields = edit(fields) or fields
    path.write_text(json.dumps({**fields, "checksum": checksum(fields) if sign else stated}), encoding="utf-8")
