"""One tiny dense bundle for all runtime tests, and its transformers reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwenforge.runtime import LanguageModel, load
from support.checkpoints import make_checkpoint
from support.ort_models import write_qwen2_bundle


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("runtime") / "checkpoint")


@pytest.fixture(scope="session")
def bundle(checkpoint: Path) -> Path:
    return write_qwen2_bundle(checkpoint, checkpoint.parent / "bundle")


@pytest.fixture
def model(bundle: Path) -> LanguageModel:
    return load(bundle, threads=2)


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def reference_greedy(reference: Any) -> Callable[..., list[int]]:
    """transformers' greedy generate for one prompt: the new tokens."""
    import torch

    def generate(prompt: Sequence[int], max_new_tokens: int, **options: Any) -> list[int]:
        ids = torch.tensor([list(prompt)])
        options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False} | options
        output = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options)
        return [int(token) for token in output[0, len(prompt) :]]

    return generate
