"""What is measured: an engine that takes prompts and gives tokens, one step after the other.

Each subject runs in a worker process of its own (:mod:`qwenforge.bench.worker`), so that memory is its own and nothing
of one engine's threads or allocator is in the other's way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from qwenforge.bench.gpu_subjects import TransformersOnGpu
from qwenforge.errors import UserError
from qwenforge.exporter.cache_argument import cache_argument

Tokens = list[list[int]]


class Subject(Protocol):
    """An engine under measurement."""

    vocab_size: int
    description: str

    def steps(self, prompts: Tokens, new_tokens: int) -> list[float]:
        """Generate ``new_tokens`` for every prompt, greedily, past any end token.

        Returns:
            ``new_tokens + 1`` times in seconds from ``time.perf_counter``: the start, then when each step's tokens
            of all prompts were known.
        """


class QwenforgeSubject:
    """A qwenforge bundle in the Python runtime."""

    def __init__(
        self, bundle: Path, threads: int, max_batch: int | None = None, plugin_library: str | None = None
    ) -> None:
        from qwenforge.runtime import load

        self._model = load(bundle, threads=threads, max_batch=max_batch, plugin_library=plugin_library)
        self.vocab_size = self._model.session.vocabulary_size
        self.description = "qwenforge"

    def steps(self, prompts: Tokens, new_tokens: int) -> list[float]:
        """See :class:`Subject`."""
        if len(prompts) > self._model.max_batch:
            raise UserError(f"{len(prompts)} prompts at once are more than the {self._model.max_batch} loaded for.")
        times = [time.perf_counter()]
        events = self._model.stream(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        for seen, _ in enumerate(events, start=1):
            if seen % len(prompts) == 0:
                times.append(time.perf_counter())
        return times


class TransformersSubject:
    """transformers in eager PyTorch with SDPA attention, its cache growing."""

    def __init__(self, checkpoint: Path, threads: int, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=kinds[dtype], local_files_only=True).eval()
        self.vocab_size = int(self._model.config.vocab_size)
        self.description = f"transformers {dtype}"

    def steps(self, prompts: Tokens, new_tokens: int) -> list[float]:
        """See :class:`Subject`."""
        import torch

        times = [time.perf_counter()]
        cache = None
        argument = cache_argument(self._model)
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            for _ in range(new_tokens):
                output = self._model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{argument: cache})
                cache = getattr(output, argument)
                tokens = output.logits[:, -1:].argmax(-1)
                times.append(time.perf_counter())
        return times


SUBJECTS: dict[str, Callable[..., Subject]] = {
    "qwenforge": QwenforgeSubject,
    "transformers": TransformersSubject,
    "transformers-gpu": TransformersOnGpu,
}
"""Subjects by name; the arguments of each are in its constructor."""
