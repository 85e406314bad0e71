"""How far a quantized model is from the model it was made of: next-token distributions, and hidden states.

Everything is computed in float64 from fp32 logits and hidden states. Divergences are in nats; KL(P || Q) has the
unquantized model's distribution as P, so that it counts what the quantized model forgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]

_ROWS = 64
"""Positions whose logits are float64 at a time: 80 MB with Qwen2's vocabulary."""
HISTOGRAM_EDGES: Floats = np.concatenate([[0.0], np.logspace(-8, 1, 37), [np.inf]])
"""Edges of the KL histogram: quarters of a decade from 1e-8 to 10 nats, and what lies beyond on both sides."""


@dataclass
class DistributionComparison:
    """Running account of two models' next-token distributions at the same positions of the same text.

    Attributes:
        divergences: KL(unquantized || quantized) of each position, in nats.
        agreements: positions where both models' best token is the same.
        reference_loss, quantized_loss: sums of -log p of the tokens that follow, in nats, over ``scored`` positions.
        non_finite: where logits were first not finite, and whose; None while all are.
    """

    divergences: list[Floats] = field(default_factory=list)
    agreements: int = 0
    reference_loss: float = 0.0
    quantized_loss: float = 0.0
    scored: int = 0
    non_finite: str | None = None

    def add(self, reference: Logits, quantized: Logits, following: Sequence[int], where: str = "") -> None:
        """Account for logits [N, V] of both models and the tokens [N - 1] or [N] that follow in the text.

        A position with a value that is not finite on either side is recorded in ``non_finite`` and left out.
        """
        if reference.shape != quantized.shape:
            raise ValueError(f"logits {quantized.shape} are compared with {reference.shape}")
        for start in range(0, len(reference), _ROWS):
            rows = slice(start, start + _ROWS)
            self._add_rows(reference[rows], quantized[rows], following[start : start + _ROWS], where)

    def _add_rows(self, reference: Logits, quantized: Logits, following: Sequence[int], where: str) -> None:
        finite: npt.NDArray[np.bool_] = np.isfinite(reference).all(1) & np.isfinite(quantized).all(1)
        if not finite.all() and self.non_finite is None:
            whose = "quantized" if np.isfinite(reference).all() else "unquantized"
            self.non_finite = f"of the {whose} model{f' {where}' if where else ''}"
        expected, actual = log_softmax(reference[finite]), log_softmax(quantized[finite])
        self.divergences.append(np.maximum((np.exp(expected) * (expected - actual)).sum(1), 0.0))
        self.agreements += int((expected.argmax(1) == actual.argmax(1)).sum())
        tokens = np.asarray(following, np.int64)
        known = finite[: len(tokens)]
        kept, tokens = np.arange(known.sum()), tokens[known]
        self.reference_loss -= float(expected[kept, tokens].sum())
        self.quantized_loss -= float(actual[kept, tokens].sum())
        self.scored += len(tokens)

    def result(self) -> DistributionAccuracy:
        """The figures so far.

        Raises:
            ValueError: nothing was compared.
        """
        values = np.concatenate(self.divergences) if self.divergences else np.empty(0)
        if not len(values) or not self.scored:
            raise ValueError("no position was compared")
        counts, _ = np.histogram(values, HISTOGRAM_EDGES)
        return DistributionAccuracy(
            positions=len(values),
            reference_perplexity=math.exp(self.reference_loss / self.scored),
            perplexity=math.exp(self.quantized_loss / self.scored),
            mean_kl=float(values.mean()),
            p99_kl=float(np.quantile(values, 0.99)),
            max_kl=float(values.max()),
            top1_agreement=self.agreements / len(values),
            kl_histogram=tuple(int(count) for count in counts),
        )


@dataclass(frozen=True)
class DistributionAccuracy:
    """What became of the next-token distributions.

    Attributes:
        positions: how many distributions were compared.
        reference_perplexity, perplexity: of the unquantized and of the quantized model on the same tokens.
        mean_kl, p99_kl, max_kl: of KL(unquantized || quantized) over the positions, in nats.
        top1_agreement: fraction of the positions where both models' best token is the same.
        kl_histogram: positions between each two of ``HISTOGRAM_EDGES``.
    """

    positions: int
    reference_perplexity: float
    perplexity: float
    mean_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float
    kl_histogram: tuple[int, ...]

    @property
    def perplexity_ratio(self) -> float:
        """Quantized over unquantized."""
        return self.perplexity / self.reference_perplexity

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON; the histogram with its edges, the outer ones of which are 0 and infinity."""
        return {
            "positions": self.positions,
            "unquantized_perplexity": self.reference_perplexity,
            "perplexity": self.perplexity,
            "perplexity_ratio": self.perplexity_ratio,
            "mean_kl": self.mean_kl,
            "p99_kl": self.p99_kl,
            "max_kl": self.max_kl,
            "top1_agreement": self.top1_agreement,
            "kl_histogram": {"inner_edges": HISTOGRAM_EDGES[1:-1].tolist(), "counts": list(self.kl_histogram)},
        }


@dataclass
class HiddenComparison:
    """Running account of hidden states [.., C] that two models have at the same tokens.

    A token's error is taken relative to the token: the first token of a text often has activations a thousand times
    larger than any other (Sun et al., "Massive Activations", 2024) and would hide every error but its own.
    """

    tokens: int = 0
    noise: float = 0.0
    cosines: float = 0.0
    non_finite: bool = False

    def add(self, reference: npt.NDArray[np.floating[Any]], quantized: npt.NDArray[np.floating[Any]]) -> None:
        """Account for hidden states of both models; tokens that are not finite are left out and recorded."""
        expected = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
        actual = quantized.reshape(-1, quantized.shape[-1]).astype(np.float64)
        finite = np.isfinite(expected).all(1) & np.isfinite(actual).all(1)
        self.non_finite |= not bool(finite.all())
        expected, actual = expected[finite], actual[finite]
        energy = (expected**2).sum(1)
        alive = energy > 0  # a token whose state is 0 has no direction, and any error is infinitely large
        expected, actual, energy = expected[alive], actual[alive], energy[alive]
        self.noise += float((((expected - actual) ** 2).sum(1) / energy).sum())
        lengths = np.sqrt(energy * (actual**2).sum(1))
        dots = (expected * actual).sum(1)
        self.cosines += float(np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0).sum())
        self.tokens += len(energy)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, -10 log10 of the tokens' mean |error|^2 / |state|^2; infinite without error."""
        if not self.tokens:
            return math.nan
        return -10 * math.log10(self.noise / self.tokens) if self.noise > 0 else math.inf

    @property
    def cosine(self) -> float:
        """The tokens' mean cosine between both states."""
        return self.cosines / self.tokens if self.tokens else math.nan


@dataclass(frozen=True)
class LayerAccuracy:
    """One layer's error.

    Attributes:
        name: ``model.layers.3``.
        own_sqnr_db, own_cosine: of its output when its input is the unquantized model's.
        sqnr_db, cosine: of its output behind all quantized layers before it.
        finite: whether every value is.
    """

    name: str
    own_sqnr_db: float
    own_cosine: float
    sqnr_db: float
    cosine: float
    finite: bool = True

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON; null where a value is not finite (no error at all, or nothing to compare)."""
        figures = {
            "own_sqnr_db": self.own_sqnr_db,
            "own_cosine": self.own_cosine,
            "sqnr_db": self.sqnr_db,
            "cosine": self.cosine,
        }
        shown = {key: value if math.isfinite(value) else None for key, value in figures.items()}
        return {"name": self.name, **shown, "finite": self.finite}


def worst_layers(layers: Sequence[LayerAccuracy], count: int = 3) -> list[LayerAccuracy]:
    """The layers with the largest error of their own, worst first: those that are not finite, then by SQNR."""

    def badness(layer: LayerAccuracy) -> tuple[bool, float]:
        known = layer.finite and not math.isnan(layer.own_sqnr_db)
        return known, layer.own_sqnr_db if known else -math.inf

    return sorted(layers, key=badness)[:count]


def log_softmax(logits: npt.NDArray[np.floating[Any]]) -> Floats:
    """log softmax of logits [N, V] over the vocabulary, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    normalized: Floats = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    return normalized
