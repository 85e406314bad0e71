"""Run a graph with the signature of ``names.py`` over caches bound in place, and the same tokens in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge import names

Array = npt.NDArray[Any]


def load_session(
    model: ir.Model, *, optimize: bool = True, disable_prepacking: bool = False, library: Path | None = None
) -> Any:
    """An ONNX Runtime session of ``model``, its weights inline, with the custom ops of ``library``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = 2
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations stay in fp32
    if disable_prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class CachedDecoder:
    """Feeds tokens to a graph; each row has its own length in a cache of ``capacity`` tokens.

    Caches start filled with garbage, which must never be seen.
    """

    def __init__(self, model: ir.Model, *, batch: int = 1, capacity: int = 48, **session: Any) -> None:
        import onnxruntime

        self._session = load_session(model, **session)
        self._lengths = np.zeros(batch, np.int64)
        self._caches: dict[str, Any] = {}
        generator = np.random.default_rng(7)
        for value in self._session.get_inputs():
            if not value.name.startswith("past_key_values."):
                continue
            kind = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}.get(value.type, np.float32)
            garbage = generator.normal(0, 3, (batch, value.shape[1], capacity, value.shape[3])).astype(kind)
            self._caches[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(garbage)
        self._garbage = {name: cache.numpy().copy() for name, cache in self._caches.items()}

    @property
    def lengths(self) -> list[int]:
        """Valid tokens of each row."""
        return [int(length) for length in self._lengths]

    def step(self, rows: Sequence[Sequence[int]], *, pad: int = 0) -> list[Array]:
        """Append each row's tokens (right-padded to the longest); logits of every valid token, [tokens, V] a row."""
        longest = max(len(row) for row in rows)
        tokens = np.full((len(rows), longest), pad, np.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        steps = np.arange(longest)
        feeds = {
            names.INPUT_IDS: tokens,
            names.POSITION_IDS: self._lengths[:, None] + steps,
            names.CACHE_POSITION: self._lengths,
            names.LOGITS_INDEX: np.tile(steps, (len(rows), 1)),
        }
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), cache)
        binding.bind_output(names.LOGITS)
        self._session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()
        added = np.array([len(row) for row in rows])
        self._lengths = self._lengths + added
        return [logits[index, :count] for index, count in enumerate(added)]

    def untouched_from(self, position: int) -> bool:
        """Whether every cache still holds its first garbage from ``position`` on."""
        return all(
            np.array_equal(cache.numpy()[:, :, position:], self._garbage[name][:, :, position:])
            for name, cache in self._caches.items()
        )


def reference_logits(model: Any, tokens: Sequence[int]) -> Array:
    """transformers' logits of every token of one row, [tokens, V] fp32."""
    import torch

    with torch.inference_mode():
        logits: Array = model(input_ids=torch.tensor([list(tokens)])).logits[0].float().numpy()
    return logits


def random_tokens(count: int, *, vocab_size: int = 256, seed: int = 0) -> list[int]:
    """``count`` token ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, count)]
