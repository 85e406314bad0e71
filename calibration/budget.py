"""How much accuracy a quantized bundle may lose, and what is said of one that loses more."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from qwenforge.calibration.accuracy import DistributionAccuracy
from qwenforge.errors import UserError


@dataclass(frozen=True)
class Budget:
    """Limits on the held-out text; a bundle beyond any of them is not written.

    Attributes:
        kl: largest mean KL(unquantized || quantized), in nats.
        ppl: largest perplexity, as a multiple of the unquantized model's.
        top1: smallest fraction of the positions at which both models choose the same token.
    """

    kl: float
    ppl: float
    top1: float

    def missed(self, accuracy: DistributionAccuracy, *others: DistributionAccuracy) -> list[str]:
        """What is beyond its limit, each as half a sentence; empty when the budget holds.

        Of several graphs that are one bundle, each limit is held to the worst.
        """
        graphs = (accuracy, *others)
        kl = _worst([each.mean_kl for each in graphs])
        ratio = _worst([each.perplexity_ratio for each in graphs])
        agreement = -_worst([-each.top1_agreement for each in graphs])
        found = []
        # Written so that a NaN misses.
        if not kl <= self.kl:
            found.append(f"mean KL is {kl:.3g} (at most {self.kl:g})")
        if not ratio <= self.ppl:
            found.append(f"perplexity is {ratio:.4f} times the unquantized (at most {self.ppl:g})")
        if not agreement >= self.top1:
            found.append(f"the best token agrees at {agreement:.1%} (at least {self.top1:.1%})")
        return found

    def tightened(self, part: float) -> Budget:
        """The budget that uses ``part`` of what this one allows to be lost."""
        return Budget(kl=self.kl * part, ppl=1 + (self.ppl - 1) * part, top1=1 - (1 - self.top1) * part)

    def to_json(self) -> dict[str, float]:
        """The limits by name, as ``--budget`` takes them."""
        return asdict(self)


def _worst(values: list[float]) -> float:
    """The largest, and NaN before any number."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)


EIGHT_BITS = Budget(kl=0.003, ppl=1.003, top1=0.97)
EIGHT_BITS_ACTIVATIONS = Budget(kl=0.009, ppl=1.009, top1=0.93)
FP8 = Budget(kl=0.03, ppl=1.03, top1=0.87)
FOUR_BITS = Budget(kl=0.07, ppl=1.07, top1=0.78)


def default_budget(weight_format: str | None, *, activations: bool, cache: bool) -> Budget:
    """The budget of an export that names none: what the formats reach when nothing went wrong, with room to spare.

    Derived from the worse of two measured checkpoints as docs/accuracy.md says; a test holds the numbers to it.

    Args:
        weight_format: that of the recipe's weights.
        activations: whether it quantizes activations.
        cache: whether it quantizes the key/value cache.
    """
    if weight_format in ("int4", "uint4"):
        return FOUR_BITS
    if cache or weight_format == "fp8":
        return FP8
    return EIGHT_BITS_ACTIVATIONS if activations else EIGHT_BITS


def parse_budget(text: str, default: Budget) -> Budget:
    """The budget of ``--budget kl=0.02,ppl=1.02,top1=0.97``; what it leaves out is ``default``'s.

    Raises:
        UserError: a key is unknown or given twice, or a number is none or out of its range.
    """
    known = [field.name for field in fields(Budget)]
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UserError(f"--budget {part.strip()!r} is no limit; write it like kl=0.02,ppl=1.02,top1=0.97.")
        if key not in known:
            raise UserError(f"--budget knows no {key!r}; give limits for {', '.join(known)}.")
        if key in given:
            raise UserError(f"--budget gives {key} twice; give it once.")
        given[key] = _number(key, number)
    return Budget(**{**asdict(default), **given})


_RANGES = {"kl": (0.0, math.inf), "ppl": (1.0, math.inf), "top1": (0.0, 1.0)}
"""Where each limit lies; a perplexity ratio below 1 would ask for a quantized model that is better."""


def _number(key: str, text: str) -> float:
    low, high = _RANGES[key]
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"--budget {key}={text} is not a number; write it like {key}=0.98.") from None
    if not (math.isfinite(value) and low <= value <= high):
        upper = f" to {high:g}" if math.isfinite(high) else " or more"
        raise UserError(f"--budget {key}={text} is out of range; {key} is {low:g}{upper}.")
    return value
