"""Logits and log-probabilities of given tokens, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qwenforge.runtime.kv_cache import rounded_capacity
from qwenforge.runtime.session import GraphSession

LOGITS_BYTES = 128 * 2**20
"""Upper bound of the logits held at once, unless one position alone needs more."""


def iterate_logits(
    session: GraphSession, tokens: Sequence[int], *, max_length: int, chunk: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (position of the first token, logits [n, V] fp32) over all of ``tokens``; copy what you keep."""
    chunk = max(1, min(chunk, LOGITS_BYTES // (4 * session.vocabulary_size)))
    capacity = session.fixed_capacity or rounded_capacity(len(tokens), max_length)
    cache = session.new_cache(1, capacity)
    try:
        for start in range(0, len(tokens), chunk):
            piece = tokens[start : start + chunk]
            step = session.bind(cache, first_row=0, batch=1, new_tokens=len(piece), logits_count=len(piece))
            step.input_ids[0] = piece
            step.logits_index[0] = np.arange(len(piece))
            step.advance_positions(np.array([start], np.int64))
            yield start, step.run()[0]
    finally:
        session.release_cache(cache)


def log_probabilities(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """The natural logarithm of each token's probability under its row of ``logits`` [n, V]; shape [n]."""
    result = np.empty(len(tokens))
    for row, token in enumerate(tokens):
        scores = logits[row].astype(np.float64)
        best = scores.max()
        result[row] = scores[token] - best - np.log(np.exp(scores - best).sum())
    return result
