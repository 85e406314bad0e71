"""The function bodies, run by ONNX Runtime as standard operators, against transformers and numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qwenforge import names
from qwenforge.graph_passes.functions import GROUPED_QUERY_ATTENTION, MIXTURE_OF_EXPERTS, function, register_function
from support.cached_decoder import CachedDecoder, random_tokens, reference_logits
from support.checkpoints import Kind
from support.expert_graphs import expert_case
from support.portable_models import portable_model, random_model
from support.small_graphs import answers, relative_error
from support.tolerances import FLOAT16, FLOAT32_EXACT, FLOAT32_MODEL

MODELS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "tied, one key/value head": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "as many key/value heads": ("qwen2", {"num_key_value_heads": 4}),
    "sliding window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "yarn": ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, renormalized, dense first layer": ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3": ("qwen3", {}),
    "qwen3, odd head counts": ("qwen3", {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 20}),
    "qwen3_moe": ("qwen3_moe", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_portable_model_answers_as_transformers_in_prefill_chunks_and_decode(name: str) -> None:
    kind, config = MODELS[name]
    model = random_model(kind, **config)
    decoder = CachedDecoder(portable_model(model), capacity=24)
    tokens = random_tokens(20)
    parts = [tokens[:9], tokens[9:15], *([token] for token in tokens[15:])]
    found = np.concatenate([decoder.step([part])[0] for part in parts])
    assert np.abs(found - reference_logits(model, tokens)).max() < FLOAT32_MODEL
    assert decoder.untouched_from(20)


@pytest.mark.parametrize("name", ["qwen2", "sliding window", "qwen3_moe"])
def test_portable_model_answers_as_transformers_for_unequal_rows(name: str) -> None:
    """Right-padded prompts, then chunks of unequal length against caches filled unequally, then single tokens."""
    kind, config = MODELS[name]
    model = random_model(kind, **config)
    rows = [random_tokens(18, seed=row) for row in range(3)]
    decoder = CachedDecoder(portable_model(model), batch=3, capacity=24)
    found: list[list[Any]] = [[], [], []]
    taken = [0, 0, 0]
    for counts in ((9, 4, 1), (3, 5, 2), (1, 1, 1), (1, 1, 1)):
        parts = [row[start : start + count] for row, start, count in zip(rows, taken, counts, strict=True)]
        for answer, logits in zip(found, decoder.step(parts, pad=5), strict=True):
            answer.append(logits)
        taken = [start + count for start, count in zip(taken, counts, strict=True)]
    assert decoder.lengths == taken
    for row, count, answer in zip(rows, taken, found, strict=True):
        assert np.abs(np.concatenate(answer) - reference_logits(model, row[:count])).max() < FLOAT32_MODEL


@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe", "qwen3"])
def test_portable_model_in_float16_is_near_transformers(name: str) -> None:
    kind, config = MODELS[name]
    model = random_model(kind, rounded_to="float16", **config)
    tokens = random_tokens(12)
    decoder = CachedDecoder(portable_model(model, dtype=ir.DataType.FLOAT16), capacity=16)
    found = np.concatenate([decoder.step([part])[0] for part in (tokens[:9], tokens[9:11], tokens[11:])])
    assert found.dtype == np.float32
    assert relative_error(found, reference_logits(model, tokens)) < FLOAT16


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_experts_answer_as_numpy(dtype: type[np.floating], top_k: int, normalize: bool) -> None:
    case = expert_case(12, top_k, normalize=normalize, dtype=dtype)
    error = relative_error(answers(case.graph(), **case.feeds())[0], case.expected())
    assert error < (FLOAT32_EXACT if dtype is np.float32 else FLOAT16)


def test_experts_of_equal_logits_are_taken_in_order() -> None:
    case = expert_case(6, 2)
    tied = replace(case, router_logits=np.zeros_like(case.router_logits))
    assert relative_error(answers(tied.graph(), **tied.feeds())[0], tied.expected()) < FLOAT32_EXACT


def test_expert_that_overflows_does_not_matter_when_it_is_not_selected() -> None:
    case = expert_case(6, 2)
    unused = int(case.router_logits[0].argmin())
    case.gate_up[unused] = 1e38
    alone = replace(case, x=case.x[:1], router_logits=case.router_logits[:1])
    found = answers(alone.graph(), **alone.feeds())[0]
    assert np.isfinite(found).all()
    assert relative_error(found, alone.expected()) < FLOAT32_EXACT


def test_router_of_large_logits_is_computed_in_float32() -> None:
    case = expert_case(16, 4, dtype=np.float16, router_scale=200.0)
    found = answers(case.graph(), **case.feeds())[0]
    assert relative_error(found, case.expected()) < FLOAT16


def test_functions_are_registered_once_and_copied_each_time() -> None:
    model = expert_case(4, 2).graph()
    register_function(model, MIXTURE_OF_EXPERTS)
    assert list(model.functions) == [(names.DOMAIN, MIXTURE_OF_EXPERTS, "")]
    first, second = function(GROUPED_QUERY_ATTENTION), function(GROUPED_QUERY_ATTENTION)
    assert first is not second and first.graph is not second.graph


def test_portable_model_is_valid_onnx() -> None:
    proto = ir.to_proto(portable_model(random_model("qwen2_moe")))
    onnx.checker.check_model(proto, full_check=True)
    assert {(function.domain, function.name) for function in proto.functions} == {
        (names.DOMAIN, GROUPED_QUERY_ATTENTION),
        (names.DOMAIN, MIXTURE_OF_EXPERTS),
    }
