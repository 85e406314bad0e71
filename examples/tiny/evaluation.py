"""Perplexity on held-out text, of a model and of the unigram model that it must beat."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from tiny.training import WINDOW


def windows(ids: Sequence[int]) -> list[Sequence[int]]:
    """``ids`` cut into consecutive windows of ``WINDOW`` tokens, an incomplete last one dropped."""
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]


def unigram_counts(documents: Sequence[list[int]], vocabulary_size: int) -> list[int]:
    """How often each token id occurs in ``documents``."""
    counter = Counter(token for ids in documents for token in ids)
    return [counter[token] for token in range(vocabulary_size)]


def unigram_perplexity(counts: Sequence[int], ids: Sequence[int]) -> float:
    """Perplexity of ``ids`` under add-one smoothed ``counts``, over the tokens that ``model_perplexity`` scores."""
    total = sum(counts) + len(counts)
    scored = [token for window in windows(ids) for token in window[1:]]
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in scored) / len(scored))


def model_perplexity(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """Perplexity of ``ids``, window by window; the first token of a window has no context and is not scored."""
    total = 0.0
    scored = 0
    with torch.no_grad():
        for window in windows(ids):
            tokens = torch.tensor([window])
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
            scored += len(window) - 1
    return math.exp(total / scored)
