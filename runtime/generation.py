"""The decoding loop: prefill once a prompt, then one token a step for every sequence that still runs.

Running sequences occupy the first rows of the cache. When one ends, the last running row moves into its place and
the step is bound again with a smaller batch: a finished sequence costs nothing more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qwenforge.runtime.kv_cache import KeyValueCache, rounded_capacity
from qwenforge.runtime.prefill import prefill
from qwenforge.runtime.results import TokenEvent
from qwenforge.runtime.sampling import Sampler
from qwenforge.runtime.session import GraphSession
from qwenforge.runtime.stopping import FinishReason, StopStrings
from qwenforge.runtime.tokenizer import IncrementalDecoder


@dataclass
class RunningSequence:
    """One sequence while it is generated.

    Attributes:
        index: its number in the batch.
        prompt: its prompt; sequences that share the object share one prefill.
        new_tokens_limit: at most so many new tokens.
        limit_reason: what ends it there.
        end_tokens: the tokens that end it.
    """

    index: int
    prompt: tuple[int, ...]
    new_tokens_limit: int
    limit_reason: FinishReason
    end_tokens: frozenset[int]
    sampler: Sampler
    decoder: IncrementalDecoder
    stop_strings: StopStrings
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def cached(self) -> int:
        """Tokens in the cache: all but the newest, which the next step takes in."""
        return len(self.prompt) + len(self.tokens) - 1

    def extend(self, logits: NDArray[np.float32]) -> TokenEvent:
        """Choose the next token from ``logits`` [V] and take it in."""
        token = self.sampler.choose(logits, itertools.chain(self.prompt, self.tokens))
        self.tokens.append(token)
        text = self.stop_strings.push(self.decoder.push(token))
        if token in self.end_tokens:
            self.finish_reason = "stop"
        elif self.stop_strings.found is None and len(self.tokens) >= self.new_tokens_limit:
            self.finish_reason = self.limit_reason
        if self.finish_reason is not None:
            text += self.stop_strings.push(self.decoder.flush())
        if self.stop_strings.found is not None:
            self.finish_reason = "stop_string"
        elif self.finish_reason is not None:
            text += self.stop_strings.flush()
        return TokenEvent(self.index, token, text, self.finish_reason)


def generate_events(
    session: GraphSession, sequences: Sequence[RunningSequence], *, max_batch: int, max_length: int, chunk: int
) -> Iterator[TokenEvent]:
    """Generate all ``sequences``, at most ``max_batch`` at a time, and report every token as it is chosen."""
    for first in range(0, len(sequences), max_batch):
        yield from _generate_batch(session, sequences[first : first + max_batch], max_length, chunk)


def _generate_batch(
    session: GraphSession, sequences: Sequence[RunningSequence], max_length: int, chunk: int
) -> Iterator[TokenEvent]:
    prompts = {id(sequence.prompt): sequence.prompt for sequence in sequences}
    ordered = sorted(prompts.values(), key=len)
    row_of = {id(prompt): row for row, prompt in enumerate(ordered)}
    needed = max(len(sequence.prompt) + sequence.new_tokens_limit for sequence in sequences)
    capacity = session.fixed_capacity or rounded_capacity(needed, max_length)
    cache = session.new_cache(len(sequences), capacity)
    try:
        logits = prefill(session, cache, ordered, chunk)

        running = _assign_rows(cache, sequences, row_of, len(ordered))
        for sequence in running:
            yield sequence.extend(logits[row_of[id(sequence.prompt)]])
        while running := _compact(cache, running):
            yield from _decode(session, cache, running)
    finally:
        session.release_cache(cache)


def _assign_rows(
    cache: KeyValueCache, sequences: Sequence[RunningSequence], row_of: dict[int, int], prompts: int
) -> list[RunningSequence]:
    """The sequences in the order of their rows: a prompt's first keeps the filled row, the others get copies."""
    leaders: dict[int, RunningSequence] = {}
    followers: list[RunningSequence] = []
    for sequence in sequences:
        row = row_of[id(sequence.prompt)]
        if leaders.setdefault(row, sequence) is not sequence:
            cache.copy_row(row, prompts + len(followers), len(sequence.prompt))
            followers.append(sequence)
    return [leaders[row] for row in range(prompts)] + followers


def _compact(cache: KeyValueCache, rows: list[RunningSequence]) -> list[RunningSequence]:
    """Drop finished sequences, moving the last running row into each gap."""
    rows = list(rows)
    for row in reversed(range(len(rows))):
        if rows[row].finish_reason is not None:
            last = rows.pop()
            if row < len(rows):
                cache.copy_row(len(rows), row, last.cached)
                rows[row] = last
    return rows


def _decode(session: GraphSession, cache: KeyValueCache, running: list[RunningSequence]) -> Iterator[TokenEvent]:
    """Steps of one token a sequence, until one of them ends."""
    step = session.bind(cache, first_row=0, batch=len(running), new_tokens=1, logits_count=1)
    step.advance_positions(np.array([sequence.cached for sequence in running], np.int64))
    while True:
        step.take([sequence.tokens[-1] for sequence in running])
        step.run()
        for sequence, logits in zip(running, step.next_logits, strict=True):
            yield sequence.extend(logits)
        if any(sequence.finish_reason is not None for sequence in running):
            return
        step.advance_by_one()
