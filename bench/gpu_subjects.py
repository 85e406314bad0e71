"""Peers of whole models on a GPU: transformers in bf16, eager or compiled, with weights drawn on the device."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

from qwenforge.exporter.cache_argument import cache_argument

Tokens = list[list[int]]


class TransformersOnGpu:
    """transformers in eager PyTorch with a growing cache, or with torch.compile and a static one.

    The model is made from the checkpoint's config.json with random weights: they need not be read, and time does not
    depend on them. Attention is SDPA. Tokens come to the host after every step, as an engine's have to.

    Args:
        checkpoint: a folder with config.json.
        max_length: prompt and new tokens together, at most: the size of a static cache.
        compiled: None for eager; else torch.compile's backend for steps of one token, ``inductor`` with CUDA graphs.
        device: where it runs.
    """

    def __init__(
        self, checkpoint: Path, max_length: int, compiled: str | None = None, device: str = "cuda", threads: int = 8
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._device, self._max_length = torch.device(device), max_length
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        with self._device:
            self._model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            ).eval()
        self._static = compiled is not None
        self._step: Any = self._model
        if compiled is not None:
            # A shape of its own for each batch: nothing is to be paid for shapes that do not come.
            options: dict[str, Any] = {"mode": "reduce-overhead"} if compiled == "inductor" else {}
            self._step = torch.compile(self._model, backend=compiled, dynamic=False, **options)
        self._caches: dict[int, Any] = {}
        self._cache_name = cache_argument(self._model)
        self._takes_positions = "cache_position" in inspect.signature(type(self._model).forward).parameters
        self.vocab_size = int(config.vocab_size)
        self.description = "transformers bf16 " + ("eager" if compiled is None else f"torch.compile ({compiled})")

    def steps(self, prompts: Tokens, new_tokens: int) -> list[float]:
        """See :class:`qwenforge.bench.subjects.Subject`."""
        return self.generate(prompts, new_tokens)[1]

    def generate(self, prompts: Tokens, new_tokens: int) -> tuple[Tokens, list[float]]:
        """The new tokens, a list for each step, and the times of :meth:`steps`."""
        import torch

        times, answers = [time.perf_counter()], []
        rows, run = prompts, self._model
        done = 0
        with torch.inference_mode():
            cache = self._cache(len(prompts))
            for _ in range(new_tokens):
                tokens = torch.tensor(rows, device=self._device)
                places = torch.arange(done, done + tokens.shape[1], device=self._device)
                arguments: dict[str, Any] = {self._cache_name: cache}
                if self._takes_positions:
                    arguments["cache_position"] = places
                output = run(input_ids=tokens, position_ids=places[None], use_cache=True, logits_to_keep=1, **arguments)
                cache = getattr(output, self._cache_name)
                rows = output.logits[:, -1:].argmax(-1).tolist()
                times.append(time.perf_counter())
                answers.append([row[0] for row in rows])
                done += tokens.shape[1]
                run = self._step
        return answers, times

    def _cache(self, batch: int) -> Any:
        """An empty one: the same one for each batch size where it is static, since graphs know its addresses."""
        if not self._static:
            return None
        from transformers import StaticCache

        if batch not in self._caches:
            self._caches[batch] = StaticCache(config=self._model.config, max_cache_len=self._max_length)
        self._caches[batch].reset()
        return self._caches[batch]
