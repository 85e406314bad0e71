"""Random checkpoints taken through the exporter, each traced once in a test run, and never allowed to read a weight."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir

from qwenforge.exporter.checkpoint import Checkpoint, CheckpointTensor
from qwenforge.exporter.instantiate import instantiate
from qwenforge.exporter.trace import TracedModel, trace
from qwenforge.graph_passes.pipeline import optimize
from support.checkpoints import Kind, make_checkpoint

POSITIONS = 256
_READERS = ("numpy", "tobytes", "tofile", "__array__", "__dlpack__")

DENSE: dict[str, Any] = {
    "num_hidden_layers": 6,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 3,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
"""A qwen2 of two kinds of layers: 0..2 see everything, 3..5 the last five tokens."""
MIXED: dict[str, Any] = {
    "num_hidden_layers": 6,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
}
"""A qwen2_moe of two kinds of layers: 3 and 5 have experts, the others a dense MLP."""
SPARSE: dict[str, Any] = {"num_hidden_layers": 3, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True}
"""A qwen2_moe of equal layers."""


@dataclass(frozen=True)
class Exported:
    """One checkpoint at the stages of its export; what is here is shared by tests, so copy before changing it."""

    checkpoint: Checkpoint
    traced: TracedModel
    fused: ir.Model

    def portable(self) -> ir.Model:
        """A new portable model of full depth."""
        with no_weight_is_read():
            return instantiate(self.fused, self.traced, self.checkpoint)

    def reference(self) -> Any:
        """The checkpoint in transformers, fp32."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.checkpoint.folder, dtype=torch.float32).eval()


def exported(kind: Kind, *, dtype: ir.DataType = ir.DataType.FLOAT, **config: Any) -> Exported:
    """The checkpoint that ``make_checkpoint(kind, **config)`` writes, traced and fused in ``dtype``."""
    return _exported(kind, dtype, json.dumps(config, sort_keys=True))


_FOLDERS: list[TemporaryDirectory[str]] = []


@functools.cache
def _exported(kind: Kind, dtype: ir.DataType, config: str) -> Exported:
    folder = TemporaryDirectory()
    _FOLDERS.append(folder)  # the tensors stay in its files until the run ends
    stored = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}[dtype]
    make_checkpoint(Path(folder.name), kind, dtype=stored, tokenizer=False, **json.loads(config))
    checkpoint = Checkpoint.open(folder.name)
    with no_weight_is_read():
        traced = trace(checkpoint, dtype)
    with no_weight_is_read():
        fused = optimize(traced.model, positions=POSITIONS).model
    return Exported(checkpoint, traced, fused)


@contextmanager
def no_weight_is_read() -> Iterator[None]:
    """Fail when a tensor of a checkpoint is asked for its values."""

    def refuse(tensor: CheckpointTensor, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"{tensor.checkpoint_name} was read")

    with mock.patch.multiple(CheckpointTensor, **dict.fromkeys(_READERS, refuse)):
        yield


def in_memory(model: ir.Model) -> ir.Model:
    """``model``, its weights read into memory: ONNX Runtime takes a model without a file only so."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    return model
