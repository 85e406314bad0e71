"""Whether the model can predict its calibration text at all.

Ranges taken from text that means nothing to the model are ranges of nothing: a wrong tokenizer, the wrong language, a
damaged checkpoint. The mean loss a token, in nats, tells: a model that knows nothing of the text is at log V or above.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.errors import UserError

Array = npt.NDArray[Any]


def losses(logits: Array, following: Array) -> Array:
    """[N] float64, nats: of logits [N, V], for the tokens [N] that follow."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    normalizer = np.log(np.exp(shifted).sum(-1))
    result: Array = normalizer - shifted[np.arange(len(following)), following]
    return result


def unigram_loss(tokens: Array, vocab_size: int) -> float:
    """Nats a token of a guess by frequency alone: the tokens' own frequencies, add-one smoothed."""
    counts = np.bincount(tokens.reshape(-1), minlength=vocab_size).astype(np.float64)
    probabilities = (counts + 1) / (counts.sum() + vocab_size)
    return float(-np.dot(counts, np.log(probabilities)) / counts.sum())


def judge(mean_loss: float, tokens: Array, vocab_size: int, source: str, *, require_prediction: bool) -> list[str]:
    """What is to be said about the loss on the calibration text, a sentence each.

    Raises:
        UserError: it is no better than a guess among all tokens, and ``require_prediction``.
    """
    uniform, unigram = math.log(vocab_size), unigram_loss(tokens, vocab_size)
    if mean_loss >= uniform:
        sentence = (
            f"the model predicts {source} no better than chance (loss {mean_loss:.2f} nats a token, a guess among "
            f"{vocab_size} tokens {uniform:.2f}): the tokenizer or the text is not this model's, or the checkpoint is "
            "damaged"
        )
        if require_prediction:
            raise UserError(sentence)
        return [sentence]
    if mean_loss >= unigram:
        return [
            f"the model predicts {source} worse than token frequencies do (loss {mean_loss:.2f} nats a token, "
            f"frequencies {unigram:.2f}): check that the tokenizer and the text are this model's"
        ]
    return []
