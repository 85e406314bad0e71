"""Prompts into the cache: short ones together, right-padded; long ones alone, in chunks.

A step of several rows always starts at cache position 0: ONNX Runtime's GroupQueryAttention refuses several rows
with several tokens each against a part-filled cache. A long prompt therefore runs as a batch of one, bound to its
own row of the cache. No step is longer than the tokens it carries need, so none overruns the capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwenforge.runtime.kv_cache import KeyValueCache
from qwenforge.runtime.session import GraphSession


@dataclass(frozen=True)
class PrefillStep:
    """Tokens ``start`` to ``stop`` of ``rows`` prompts, from cache row ``first_row`` on; shorter ones are padded."""

    first_row: int
    rows: int
    start: int
    stop: int


def plan_prefill(lengths: Sequence[int], chunk: int) -> Iterator[PrefillStep]:
    """Steps of at most ``chunk`` tokens, padding counted, for prompts of ascending ``lengths``."""
    first = 0
    while first < len(lengths):
        if lengths[first] > chunk:
            for start in range(0, lengths[first], chunk):
                yield PrefillStep(first, 1, start, min(start + chunk, lengths[first]))
            first += 1
            continue
        end = first + 1
        while end < len(lengths) and (end + 1 - first) * lengths[end] <= chunk:
            end += 1
        yield PrefillStep(first, end - first, 0, lengths[end - 1])
        first = end


def prefill(
    session: GraphSession, cache: KeyValueCache, prompts: Sequence[Sequence[int]], chunk: int
) -> NDArray[np.float32]:
    """Fill cache rows 0, 1, ... with ``prompts``, which are ordered by length.

    Returns:
        logits [len(prompts), V] fp32 after each prompt's last token.
    """
    logits = np.empty((len(prompts), session.vocabulary_size), np.float32)
    for step in plan_prefill([len(prompt) for prompt in prompts], chunk):
        rows = range(step.first_row, step.first_row + step.rows)
        bound = session.bind(
            cache, first_row=step.first_row, batch=step.rows, new_tokens=step.stop - step.start, logits_count=1
        )
        for index, row in enumerate(rows):
            tokens = prompts[row][step.start : step.stop]
            bound.input_ids[index, : len(tokens)] = tokens
            bound.logits_index[index] = len(tokens) - 1
        bound.advance_positions(np.full(step.rows, step.start, np.int64))
        logits[rows.start : rows.stop] = bound.run()[:, 0]
    return logits
