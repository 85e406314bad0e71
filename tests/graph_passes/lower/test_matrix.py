"""The lowered graph against the portable one, run from its function bodies, over the shapes of the family."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import names
from qwenforge.graph_passes.functions import GROUPED_QUERY_ATTENTION, MIXTURE_OF_EXPERTS
from qwenforge.graph_passes.lower import lower
from support.cached_decoder import CachedDecoder, random_tokens
from support.checkpoints import Kind
from support.portable_models import portable_model, random_model
from support.small_graphs import Array, ops, relative_error
from support.tolerances import FLOAT32_MODEL

CAPACITY = 16
HALF_BOUND = 2e-2
"""Two fp16 models of two layers against each other, relative: each is within 1 % of the fp32 one."""


def _heads(heads: int, kv_heads: int, size: int) -> dict[str, Any]:
    """A qwen2's head size is hidden size / heads, a qwen3's is free."""
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}


DENSE: dict[str, tuple[Kind, dict[str, Any]]] = {
    **{f"head size {size}": ("qwen3", _heads(4, 2, size)) for size in (8, 12, 16, 24, 32, 64)},
    **{f"head size {size}, biases": ("qwen2", {"hidden_size": 4 * size}) for size in (8, 12, 16, 24, 32)},
    "as many key/value heads": ("qwen2", {"num_key_value_heads": 4}),
    "one key/value head": ("qwen2", {"num_key_value_heads": 1}),
    "7 heads on each key/value head": (
        "qwen2",
        {"hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2},
    ),
    "7 heads on one key/value head": (
        "qwen2",
        {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    "5 heads, 5 key/value heads": ("qwen2", {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    **{
        f"window of {window}": (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1},
        )
        for window in (1, 4, 200)
    },
}
SPARSE: dict[str, tuple[Kind, dict[str, Any]]] = {
    **{
        f"{top_k} of {experts} experts": (
            "qwen2_moe",
            {"num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": bool(top_k % 2)},
        )
        for top_k, experts in ((1, 3), (2, 3), (3, 3), (4, 60), (5, 60), (6, 16), (7, 60), (8, 64))
    },
    "not renormalized": ("qwen2_moe", {"norm_topk_prob": False}),
    "renormalized": ("qwen2_moe", {"norm_topk_prob": True}),
    "no shared expert": ("qwen3_moe", {"head_dim": 16}),
    "no shared expert, head size 24": ("qwen3_moe", {"head_dim": 24, "norm_topk_prob": True}),
    "a dense layer": ("qwen2_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3}),
    "every second layer dense": ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
}


@functools.cache
def _portable(name: str, dtype: ir.DataType) -> tuple[ir.Model, tuple[Array, Array]]:
    """The portable model and what it answers to :func:`_rows` and :func:`_chunks`."""
    kind, config = (DENSE | SPARSE)[name]
    model = portable_model(random_model(kind, rounded_to=dtype.numpy().name, seed=1, **config), dtype=dtype)
    return model, _answers(model)


def _answers(model: ir.Model, **options: bool) -> tuple[Array, Array]:
    rows = _rows(CachedDecoder(model, batch=3, capacity=CAPACITY, **options))
    return np.concatenate(rows), np.concatenate(_chunks(CachedDecoder(model, capacity=CAPACITY, **options)))


def _compared(name: str, how: str, dtype: ir.DataType) -> list[tuple[Array, Array]]:
    """(lowered, portable) answers."""
    model, expected = _portable(name, dtype)
    lowered = lower(model.clone(), "ort-cpu", weights=how)
    assert (GROUPED_QUERY_ATTENTION in ops(lowered)) == ("head size 12" in name), "the function stays for size 12 only"
    assert MIXTURE_OF_EXPERTS not in ops(lowered)
    assert all(node.domain != names.DOMAIN for node in lowered.graph) == ("head size 12" not in name)
    found = _answers(lowered, disable_prepacking=how == "link")
    return list(zip(found, expected, strict=True))


def _rows(decoder: CachedDecoder) -> list[Any]:
    """Prefill from 0 with right-padded rows, then decode at different positions."""
    rows = [random_tokens(count, seed=count) for count in (9, 4, 1)]
    return [*decoder.step(rows, pad=5), *decoder.step([[7], [8], [9]]), *decoder.step([[1], [2], [3]])]


def _chunks(decoder: CachedDecoder) -> list[Any]:
    """One row: a prompt, two chunks against the part-filled cache, decode into its last place."""
    tokens = random_tokens(CAPACITY, seed=1)
    parts = [tokens[:6], tokens[6:11], tokens[11:15], tokens[15:]]
    return [logits for part in parts for logits in decoder.step([part])]


@pytest.mark.parametrize("how", ["copy", "link"])
@pytest.mark.parametrize("name", DENSE | SPARSE)
def test_lowered_model_answers_as_the_portable_one(name: str, how: str) -> None:
    for found, expected in _compared(name, how, ir.DataType.FLOAT):
        assert np.abs(found - expected).max() < FLOAT32_MODEL


@pytest.mark.parametrize("name", DENSE)
def test_lowered_dense_model_in_half_precision_is_near_the_portable_one(name: str) -> None:
    """Experts have tests of their own: here rounding may choose others (:mod:`test_ort_moe`, :mod:`test_exported`)."""
    for found, expected in _compared(name, "copy", ir.DataType.FLOAT16):
        assert relative_error(found, expected) < HALF_BOUND
