"""The calibration of a layer's experts, one after the other: each has scales of its own.

An expert that was given too few tokens says little about its channels: its weights are then quantized by their own
statistics, without smoothing, clipping or compensation, and the range of its activations is taken from the other
experts' in proportion to what its weights can make of a token. Such experts are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.calibration.activations import SAMPLE_TOKENS
from qwenforge.calibration.experts import Experts, hidden
from qwenforge.calibration.gptq import CompensatedRounding
from qwenforge.calibration.matrices import rounded
from qwenforge.calibration.observers import ChannelStatistics, MagnitudeHistogram
from qwenforge.calibration.ranges import choose_range, round_to_codes, scale_of
from qwenforge.calibration.recipes import Recipe, is_override
from qwenforge.calibration.smoothing import awq_candidates, output_errors
from qwenforge.calibration.weight_scales import clipped_scales, group_scales, tensor_scales
from qwenforge.calibration.work_folder import Coverage
from qwenforge.exporter.transforms import spread_groups
from qwenforge.graph_passes.quantize.plan import SitePlan

Array = npt.NDArray[Any]

_SEARCHED_TOKENS = 64
"""Of each expert, where all experts share factors."""
_NAMED = 12


class ExpertCalibration:
    """One expert site.

    Args:
        recipe: what is asked for.
        name: of the site.
        experts: its matrices and tokens.

    Attributes:
        choice: what is done to it.
        columns: [C], the factors of the norm before the experts; 1 until they are found.
        warnings: a sentence each.
    """

    def __init__(self, recipe: Recipe, name: str, experts: Experts) -> None:
        self.name = name
        self.experts = experts
        self.choice = _choice(recipe, name)
        self.columns: Array = np.ones(experts.channels, np.float32)
        self.warnings: list[str] = []
        self._recipe = recipe
        self._factors: Array = np.ones((experts.count, experts.width), np.float32)

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """The tokens of each expert; empty without data."""
        if self.experts.tokens is None:
            return ()
        return (Coverage(site=self.name, tokens=self.experts.tokens_by_expert, floor=self._recipe.expert_floor),)

    def column_maxima(self) -> Array:
        """[C], the largest magnitude of each column over all experts' gate and up."""
        every = [np.abs(self.experts.gate_up(each)).max(0) for each in range(self.experts.count)]
        largest: Array = np.maximum.reduce(every)
        return largest

    def output_errors(self, candidates: Sequence[Array]) -> Array:
        """Of gate and up, for each candidate's factors [C], experts weighted by their tokens."""
        total = np.zeros(len(candidates))
        assert self.experts.tokens is not None
        for expert in range(self.experts.count):
            given = self.experts.given(expert)
            if self._is_covered(expert):
                inputs = self.experts.inputs(_some(given, _SEARCHED_TOKENS))
                found = output_errors(inputs, self.experts.gate_up(expert), candidates, self._rounded)
                total += found * len(given) / self.experts.tokens.count
        return total

    def smooth(self) -> Array:
        """[E, I]: AWQ's factors of each expert's activated channels, 1 where it was given too few tokens."""
        for expert in range(self.experts.count):
            if not self._is_covered(expert):
                continue
            numbers = _some(self.experts.given(expert), SAMPLE_TOKENS)
            activated = np.concatenate([each for _, each in self.experts.chunks(expert, numbers)])
            candidates = awq_candidates(np.abs(activated).mean(0, dtype=np.float64))
            errors = output_errors(activated, self.experts.down(expert), candidates, self._rounded)
            self._factors[expert] = candidates[int(np.argmin(errors))]
        return self._factors

    def calibrate(self, tensors: dict[str, Array]) -> SitePlan:
        """Put the site's numbers into ``tensors`` and return what is done to it."""
        if self.choice.weight is not None:
            found = [self._calibrate_expert(expert) for expert in range(self.experts.count)]
            for part in found[0].numbers:
                tensors[f"{self.name}.{part}"] = np.stack([each.numbers[part] for each in found])
            if self.choice.activation is not None:
                tensors[f"{self.name}.activation_scales"] = self._activation_scales(found)
        self._warn()
        return self.choice

    def _calibrate_expert(self, expert: int) -> _Expert:
        factors = self._factors[expert]
        gate_up = self.experts.gate_up(expert) * self.columns
        gate_up[self.experts.width :] /= factors[:, None]
        down = self.experts.down(expert) * factors
        observed = self._observe(expert) if self._is_covered(expert) else None
        result = _Expert(observed.range if observed is not None else None)
        for part, matrix, seen in (("gate_up", gate_up, 0), ("down", down, 1)):
            statistics = observed.statistics[seen] if observed is not None else None
            moments = observed.moments[seen] if observed is not None else None
            self._quantize(result, part, matrix, statistics, moments)
        return result

    def _quantize(
        self, result: _Expert, part: str, matrix: Array, statistics: ChannelStatistics | None, moments: Array | None
    ) -> None:
        weight, group = self.choice.weight, self.choice.group_size or matrix.shape[1]
        assert weight is not None and weight != "uint4"
        if self._recipe.weight_granularity == "tensor" and not is_override(self.choice):
            scales = tensor_scales(matrix, weight)
        elif self._recipe.clipping and statistics is not None:
            scales = clipped_scales(matrix, statistics.mean_square, weight, group)
        else:
            scales = group_scales(matrix, weight, group)
        result.numbers[f"{part}_scales"] = scales
        if self._recipe.rounding == "gptq" and weight != "fp8":
            steps = spread_groups(scales, group, matrix.shape[1])
            if moments is not None:
                codes = CompensatedRounding(moments).round(matrix, steps, weight)
            else:
                codes = round_to_codes(matrix / steps, weight).astype(np.int8)
            result.numbers[f"{part}_codes"] = codes

    def _observe(self, expert: int) -> _Observed:
        """What the expert's two matrices are given, smoothed."""
        found = _Observed(self.experts.channels, self.experts.width, gptq=self._recipe.rounding == "gptq")
        for inputs, activated in self.experts.chunks(expert, self.experts.given(expert)):
            found.add(inputs / self.columns, activated / self._factors[expert])
        found.finish(self._recipe, self.choice)
        return found

    def _activation_scales(self, found: Sequence[_Expert]) -> Array:
        """[1 + E] float32: of the tokens, then of each expert's activated channels."""
        assert self.experts.tokens is not None and self.choice.activation is not None
        tokens = self.experts.tokens.histogram(self.columns)
        ranges = [each.range for each in found]
        reaches = [_reach(self.experts.gate_up(expert)) for expert in range(self.experts.count)]
        known = [value / reach for value, reach in zip(ranges, reaches, strict=True) if value is not None and reach > 0]
        for expert, value in enumerate(ranges):
            if value is None:
                ranges[expert] = max(known) * reaches[expert] if known else self._range_of_any_tokens(expert)
        all_ranges = [choose_range(tokens, self._recipe.activation_range, "fp8", self._recipe.percentile), *ranges]
        return np.array([scale_of(value or 0.0, self.choice.activation) for value in all_ranges], np.float32)

    def _range_of_any_tokens(self, expert: int) -> float:
        """Where no expert was given enough tokens: what this one would make of a sample of all."""
        assert self.experts.tokens is not None
        return float(np.abs(hidden(self.experts.tokens.sample(), self.experts.gate_up(expert))).max())

    def _is_covered(self, expert: int) -> bool:
        return len(self.experts.given(expert)) >= self._recipe.expert_floor

    def _rounded(self, matrix: Array) -> Array:
        return rounded(matrix, self.choice)

    def _warn(self) -> None:
        for coverage in self.coverage:
            few = coverage.below_floor
            if few and self.choice.weight is not None:
                self.warnings.append(
                    f"{len(few)} of {len(coverage.tokens)} experts of {self.name} were given fewer than "
                    f"{coverage.floor} tokens and are quantized by their weights alone: {_listed(few)}"
                )
            if coverage.dead:
                self.warnings.append(f"experts of {self.name} that no token was given to: {_listed(coverage.dead)}")


class _Expert:
    """Numbers of one expert: scales and codes by name, and the largest activated channel to cover."""

    def __init__(self, largest: float | None) -> None:
        self.range = largest
        self.numbers: dict[str, Array] = {}


class _Observed:
    """What one expert's two matrices are given."""

    def __init__(self, channels: int, width: int, *, gptq: bool) -> None:
        self.statistics = (ChannelStatistics(channels), ChannelStatistics(width))
        sizes = (channels, width)
        self.moments = [np.zeros((size, size), np.float32) if gptq else None for size in sizes]
        self.histogram = MagnitudeHistogram()
        self.range: float | None = None

    def add(self, inputs: Array, activated: Array) -> None:
        for index, values in enumerate((inputs, activated)):
            self.statistics[index].add(values)
            moments = self.moments[index]
            if moments is not None:
                moments += values.T @ values
        self.histogram.add(activated)

    def finish(self, recipe: Recipe, choice: SitePlan) -> None:
        if choice.activation is not None:
            self.range = choose_range(self.histogram, recipe.activation_range, choice.activation, recipe.percentile)


def _choice(recipe: Recipe, name: str) -> SitePlan:
    choice = recipe.choose(name, "experts")
    if choice.activation != "int8":
        return choice
    reason = "experts with int8 weights have no static activation scales: targets quantize their tokens as they come"
    return choice.model_copy(update={"activation": None, "reason": reason})


def _some(tokens: Array, limit: int) -> Array:
    """At most ``limit`` of the numbers, at equal distances."""
    return tokens[np.unique(np.linspace(0, len(tokens) - 1, min(limit, len(tokens))).astype(np.int64))]


def _reach(gate_up: Array) -> float:
    """How far activated channels can go for tokens of a given length: the largest |gate row| |up row|."""
    gate, up = np.split(np.linalg.norm(gate_up.astype(np.float64), axis=1), 2)
    return float((gate * up).max())


def _listed(experts: Sequence[int]) -> str:
    named = ", ".join(map(str, experts[:_NAMED]))
    return named + (f" and {len(experts) - _NAMED} more" if len(experts) > _NAMED else "")
