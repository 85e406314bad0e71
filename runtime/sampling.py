"""From a row of logits to a token: greedy, or the processors of transformers in their order, then one draw.

Order, as in transformers' ``GenerationMixin._get_logits_processor``: repetition penalty, temperature, top-k, top-p,
min-p. Each processor takes and returns one row of fp32 scores [V]; a removed token's score is minus infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwenforge.errors import BundleError, UserError

Scores = NDArray[np.float32]


LEAST_TEMPERATURE = 0.001
"""The least temperature above greedy's 0."""


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen; the defaults choose greedily.

    Attributes:
        temperature: None or 0 for greedy, else the scores' divisor.
        top_k: keep the k best tokens.
        top_p: keep the smallest set of best tokens whose probability reaches top_p.
        min_p: keep tokens at least min_p times as probable as the best.
        repetition_penalty: divides the score of tokens seen in prompt or answer (multiplies a negative one); 1 is off.
        seed: same seed, same prompt, same sample, whatever else is in the batch; None draws fresh entropy.

    Raises:
        UserError: a value is out of range, or top_k, top_p or min_p is given without a temperature.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        # Below the least temperature, fp32 scores overflow.
        if self.temperature and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: give 0 for greedy, or {LEAST_TEMPERATURE} or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: give at least 1, or leave it out to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a number above 0 and up to 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}: give a number from 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}: give a positive number, 1 for none")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more")
        unused = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.greedy and unused:
            raise UserError(f"{unused[0]} has no effect on greedy decoding: give a temperature above 0 too")

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        return not self.temperature


def penalize_repetition(scores: Scores, seen: Iterable[int], penalty: float) -> Scores:
    """Make ``seen`` tokens less likely: a positive score is divided, a negative one multiplied by ``penalty``."""
    tokens = np.unique(np.fromiter(seen, np.int64))
    tokens = tokens[tokens < scores.size]
    result: Scores = scores.copy()
    picked = scores[tokens]
    result[tokens] = np.where(picked < 0, picked * np.float32(penalty), picked / np.float32(penalty))
    return result


def scale_temperature(scores: Scores, temperature: float) -> Scores:
    """Divide by ``temperature``."""
    scaled: Scores = scores / np.float32(temperature)
    return scaled


def keep_top_k(scores: Scores, top_k: int) -> Scores:
    """Remove every token that scores below the k-th best (ties with it stay)."""
    if top_k >= scores.size:
        return scores
    threshold = np.partition(scores, -top_k)[-top_k]
    return np.where(scores < threshold, np.float32(-np.inf), scores)


def keep_top_p(scores: Scores, top_p: float) -> Scores:
    """Keep the most probable tokens until their probabilities reach ``top_p``; the best always stays."""
    candidates = np.flatnonzero(scores > -np.inf)
    probabilities = _softmax(scores[candidates])
    # A few tokens usually hold top_p of the mass: sorting those is ten times faster than sorting a vocabulary.
    count = min(1024, candidates.size)
    best = _largest(probabilities, count)
    while count < candidates.size and probabilities[best].sum() < top_p:
        count = min(8 * count, candidates.size)
        best = _largest(probabilities, count)
    descending = best[np.argsort(-probabilities[best], kind="stable")]
    before = np.cumsum(probabilities[descending]) - probabilities[descending]
    kept = candidates[descending[before < top_p]]
    result = np.full_like(scores, -np.inf)
    result[kept] = scores[kept]
    return result


def keep_min_p(scores: Scores, min_p: float) -> Scores:
    """Remove tokens less probable than ``min_p`` times the best one."""
    if min_p == 0:
        return scores
    threshold = scores.max() + np.float32(math.log(min_p))
    return np.where(scores < threshold, np.float32(-np.inf), scores)


def process(scores: Scores, options: SamplingOptions, seen: Iterable[int]) -> Scores:
    """Apply the processors that ``options`` asks for to one row of scores [V]."""
    if options.repetition_penalty != 1.0:
        scores = penalize_repetition(scores, seen, options.repetition_penalty)
    if options.temperature:
        scores = scale_temperature(scores, options.temperature)
    if options.top_k is not None:
        scores = keep_top_k(scores, options.top_k)
    if options.top_p is not None and options.top_p < 1:
        scores = keep_top_p(scores, options.top_p)
    if options.min_p is not None:
        scores = keep_min_p(scores, options.min_p)
    return scores


class Sampler:
    """Chooses the tokens of one sequence; its random stream depends on the seed and the sample's number alone."""

    def __init__(self, options: SamplingOptions, sample: int = 0) -> None:
        """``sample`` is the sequence's number among the n of its prompt."""
        self.options = options
        self._takes_best = options.greedy and options.repetition_penalty == 1.0
        self._random = np.random.default_rng(None if options.seed is None else (options.seed, sample))

    def choose(self, scores: Scores, seen: Iterable[int]) -> int:
        """The next token for logits ``scores`` [V], after the tokens ``seen`` (prompt and answer).

        Raises:
            BundleError: the logits hold a NaN or an infinite best score.
        """
        first = scores.argmax()  # of a NaN, where there is one
        best = scores[first]
        if not math.isfinite(best):
            raise BundleError(
                f"the model's logits hold {best}: its weights are damaged, or float16 overflowed; "
                "export with --dtype fp32"
            )
        if self._takes_best:
            return int(first)
        processed = process(scores, self.options, seen)
        if self.options.greedy:
            return int(processed.argmax())
        candidates = np.flatnonzero(processed > -np.inf)
        cumulative = np.cumsum(_softmax(processed[candidates]))
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(candidates[min(int(drawn), candidates.size - 1)])


def _softmax(scores: Scores) -> NDArray[np.float64]:
    exponentials = np.exp(scores.astype(np.float64) - float(scores.max()))
    return np.asarray(exponentials / exponentials.sum())


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """The indices of the ``count`` largest values, in no order."""
    if count == values.size:
        return np.arange(count)
    return np.argpartition(values, -count)[-count:]
