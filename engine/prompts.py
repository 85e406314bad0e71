"""Token sequences to verify a model on: text when the checkpoint has a tokenizer, else seeded random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Return a copy of the string with leading and trailing whitespace removed.",
    "Once upon a time, in a village at the edge of a great forest, there lived",
    "1, 1, 2, 3, 5, 8, 13,",
    'Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except',
    "今天天气很好，",
    "x",
)
LENGTHS = (5, 17, 9, 24, 3, 31, 12, 1)
"""Lengths of the random prompts: unequal, and one of a single token."""


def verification_prompts(tokenizer: Path | None, vocab_size: int, longest: int) -> list[list[int]]:
    """Eight prompts of unequal length, at most ``longest`` tokens each, every token below ``vocab_size``."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, vocab_size, length).tolist() for length in LENGTHS]
    if tokenizer is not None:
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(str(tokenizer))
        for index, text in enumerate(TEXTS):
            tokens = [token for token in encoder.encode(text).ids if token < vocab_size]
            prompts[index] = tokens or prompts[index]
    return [prompt[: max(1, longest)] for prompt in prompts]
