"""Perplexity of a text under a bundle, window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwenforge.errors import UserError
from qwenforge.runtime.language_model import LanguageModel

DEFAULT_WINDOW = 2048
"""Tokens of a window where the bundle's context allows it, as in most published measurements."""


@dataclass(frozen=True)
class TextScore:
    """What a text costs a model.

    Attributes:
        tokens: of the text, those left out by a limit not counted.
        scored: tokens that were predicted: all but the first of each window, which has no context.
        windows, window: how many, of how many tokens; the last one may be shorter.
        loss: mean of -log p over the scored tokens, in nats.
    """

    tokens: int
    scored: int
    windows: int
    window: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss)


def score_text(
    model: LanguageModel,
    tokens: Sequence[int],
    *,
    window: int | None = None,
    limit: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> TextScore:
    """Score ``tokens``, cut into consecutive windows that each start from an empty cache.

    Args:
        model: the bundle.
        tokens: of the whole text.
        window: tokens of a window; by default 2048, or the bundle's context where that is shorter.
        limit: windows at most.
        progress: told what is being done and the fraction of it that is done.

    Raises:
        UserError: the window does not fit the bundle, or nothing is left to score.
    """
    size = window if window is not None else min(DEFAULT_WINDOW, model.max_length)
    if not 2 <= size <= model.max_length:
        raise UserError(f"--window {size} does not fit: give 2 to {model.max_length}, the bundle's context.")
    pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    pieces = [piece for piece in pieces if len(piece) > 1][:limit]
    if not pieces:
        raise UserError(
            f"the text has {len(tokens)} tokens, and scoring one needs another before it; give a longer text."
        )
    total, scored = 0.0, 0
    for index, piece in enumerate(pieces):
        if progress is not None:
            progress(f"window {index + 1} of {len(pieces)}", index / len(pieces))
        total -= float(model.score(piece).sum())
        scored += len(piece) - 1
    return TextScore(sum(map(len, pieces)), scored, len(pieces), size, total / scored)
