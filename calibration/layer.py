"""The calibration of one piece of a model: factors, scales and ranges of its sites from what their inputs carry.

Smoothing first, then the scales and codes of the smoothed weights, then the ranges of the smoothed activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.calibration.activations import Activation
from qwenforge.calibration.expert_site import ExpertCalibration
from qwenforge.calibration.gptq import CompensatedRounding, channel_blocks
from qwenforge.calibration.matrices import read_matrix, rounded
from qwenforge.calibration.observers import MagnitudeHistogram
from qwenforge.calibration.outliers import outliers
from qwenforge.calibration.places import Place
from qwenforge.calibration.ranges import choose_range, round_to_codes, scale_of
from qwenforge.calibration.recipes import Recipe, is_override
from qwenforge.calibration.smoothing import (
    SMOOTHQUANT_STRENGTHS,
    awq_candidates,
    output_errors,
    smoothquant_factors,
)
from qwenforge.calibration.weight_scales import clipped_scales, group_scales, tensor_scales
from qwenforge.calibration.work_folder import Outlier, PieceResult
from qwenforge.exporter import weights
from qwenforge.exporter.transforms import spread_groups
from qwenforge.graph_passes.quantize.plan import SitePlan
from qwenforge.graph_passes.quantize.sites import LinearSite

Array = npt.NDArray[Any]
Done = Callable[[str], None]
"""Told the name of each site when it is done."""

_UNCLIPPED = ("q_proj", "k_proj")
"""Their outputs are multiplied by each other, so that errors of outputs say little: AWQ's code leaves them out too."""


@dataclass
class LayerCalibration:
    """What is known of one piece, and what comes of it.

    Args:
        recipe: what is asked for.
        linear: the piece's linear sites.
        experts: its expert site, where it has one.
        places: where it can be smoothed.
        inputs: by linear site, what it reads; empty without data.
    """

    recipe: Recipe
    linear: Sequence[LinearSite]
    experts: ExpertCalibration | None
    places: Sequence[Place]
    inputs: Mapping[str, Activation]
    tensors: dict[str, Array] = field(default_factory=dict)
    columns: dict[str, Array] = field(default_factory=dict)
    row_divisors: dict[str, Array] = field(default_factory=dict)
    _kept_rounding: tuple[tuple[int, bytes, int], CompensatedRounding] | None = field(default=None, init=False)

    def run(self, done: Done) -> PieceResult:
        """Calibrate the piece; its numbers are in ``tensors`` afterwards, under a plan's names."""
        choices = {site.name: self.recipe.choose(site.name, site.role) for site in self.linear}
        smoothed = tuple(place.name for place in self.places if self._smooth(place, choices))
        found: list[Outlier] = []
        ranges: dict[tuple[int, bytes, str], float] = {}
        for site in self.linear:
            if choices[site.name].weight is not None:
                found += self._weights(site, choices[site.name])
                self._activations(site, choices[site.name], ranges)
            done(site.name)
        result = PieceResult(smoothed=smoothed, outliers=(*self._input_outliers(), *found))
        if self.experts is not None:
            choices[self.experts.name] = self.experts.calibrate(self.tensors)
            result.coverage, result.warnings = self.experts.coverage, tuple(self.experts.warnings)
            done(self.experts.name)
        result.sites = choices
        return result

    def _matrix(self, site: LinearSite) -> Array:
        """The matrix [N, K], float32, not smoothed."""
        return read_matrix(weights.transpose(site.weight, (1, 0)), site.name)

    def _smoothed(self, site: LinearSite) -> Array:
        matrix = self._matrix(site)
        if site.name in self.columns:
            matrix *= self.columns[site.name]
        if site.name in self.row_divisors:
            matrix /= self.row_divisors[site.name][:, None]
        return matrix

    def _smooth(self, place: Place, choices: Mapping[str, SitePlan]) -> bool:
        """Find the factors of ``place``; False where nothing that is quantized reads it."""
        if self.recipe.smoothing is None:
            return False
        readers = [site for site in self.linear if site.name in place.readers and choices[site.name].weight is not None]
        if self.recipe.smoothing == "smoothquant":
            readers = [site for site in readers if choices[site.name].activation is not None]
        experts = self.experts if place.experts is not None and self.experts is not None else None
        if experts is not None and experts.choice.weight is None:
            experts = None
        if place.kind == "experts":
            factors = experts.smooth() if experts is not None and self.recipe.smoothing == "awq" else None
            if factors is not None:
                self.tensors[f"{place.name}.smoothing"] = factors
            return factors is not None
        if not readers and (experts is None or self.recipe.smoothing == "smoothquant"):
            return False
        factors = self._factors(place, readers, experts, choices)
        self.tensors[f"{place.name}.smoothing"] = factors
        for name in place.readers:
            self.columns[name] = place.spread(factors)
        if place.experts is not None and self.experts is not None:
            self.experts.columns = factors
        if place.divides is not None:
            self._divide(place.divides, factors)
        return True

    def _divide(self, divides: tuple[str, int], factors: Array) -> None:
        name, start = divides
        site = next(site for site in self.linear if site.name == name)
        rows = self.row_divisors.setdefault(name, np.ones(weights.dims(site.weight)[1], np.float32))
        rows[start : start + len(factors)] *= factors

    def _factors(
        self,
        place: Place,
        readers: Sequence[LinearSite],
        experts: ExpertCalibration | None,
        choices: Mapping[str, SitePlan],
    ) -> Array:
        activation = self._input(place)
        if self.recipe.smoothing == "smoothquant":
            return self._smoothquant_factors(place, activation, readers, experts, choices)
        candidates = awq_candidates(place.shared(activation.statistics.mean_magnitude, np.add))
        spread = [place.spread(factors) for factors in candidates]
        errors = self._errors(activation.sample(), readers, spread, choices)
        if experts is not None:
            errors += experts.output_errors(spread)
        return candidates[int(np.argmin(errors))]

    def _smoothquant_factors(
        self,
        place: Place,
        activation: Activation,
        readers: Sequence[LinearSite],
        experts: ExpertCalibration | None,
        choices: Mapping[str, SitePlan],
    ) -> Array:
        """Factors of all tokens; their strength, unless it is given, by each half of the tokens judged on the other."""
        columns = [np.abs(self._matrix(site)).max(0) for site in readers]
        columns += [experts.column_maxima()] if experts is not None else []
        largest = place.shared(np.maximum.reduce(columns), np.maximum)
        strength = self.recipe.smoothing_strength
        if strength is None:
            errors = np.zeros(len(SMOOTHQUANT_STRENGTHS))
            halves = activation.halves()
            for known, unseen in (halves, halves[::-1]):
                inputs = place.shared(known.largest, np.maximum)
                spread = [place.spread(smoothquant_factors(inputs, largest, each)) for each in SMOOTHQUANT_STRENGTHS]
                quantized = [self._quantized_inputs(unseen.sample, known.sample, factors) for factors in spread]
                errors += self._errors(unseen.sample, readers, spread, choices, quantized)
            strength = SMOOTHQUANT_STRENGTHS[int(np.argmin(errors))]
        return smoothquant_factors(place.shared(activation.statistics.largest, np.maximum), largest, strength)

    def _errors(
        self,
        sample: Array,
        readers: Sequence[LinearSite],
        candidates: Sequence[Array],
        choices: Mapping[str, SitePlan],
        quantized_inputs: Sequence[Array] | None = None,
    ) -> Array:
        """Of each of ``candidates``, all readers' output errors on ``sample`` [T, K] together."""
        errors = np.zeros(len(candidates))
        for site in readers:
            quantized = functools.partial(rounded, choice=choices[site.name])
            errors += output_errors(sample, self._matrix(site), candidates, quantized, quantized_inputs)
        return errors

    def _quantized_inputs(self, tokens: Array, known: Array, factors: Array) -> Array:
        """What ``tokens`` [T, K] become, divided by ``factors`` on the way, in the range of the tokens ``known``."""
        assert self.recipe.activation is not None
        histogram = MagnitudeHistogram()
        histogram.add(known / factors)
        largest = choose_range(histogram, self.recipe.activation_range, self.recipe.activation, self.recipe.percentile)
        scale = np.float32(scale_of(largest, self.recipe.activation))
        values: Array = round_to_codes(tokens / factors / scale, self.recipe.activation) * scale * factors
        return values

    def _input(self, place: Place) -> Activation:
        for name in place.readers:
            if name in self.inputs:
                return self.inputs[name]
        assert self.experts is not None and self.experts.experts.tokens is not None
        return self.experts.experts.tokens

    def _weights(self, site: LinearSite, choice: SitePlan) -> list[Outlier]:
        """Scales, and codes where they are not the nearest ones."""
        assert choice.weight is not None and choice.weight != "uint4"
        matrix = self._smoothed(site)
        group = choice.group_size or matrix.shape[1]
        activation = self.inputs.get(site.name)
        divisors = self.columns.get(site.name, np.ones(matrix.shape[1], np.float32))
        if self.recipe.weight_granularity == "tensor" and not is_override(choice):
            scales = tensor_scales(matrix, choice.weight)
        elif self.recipe.clipping and activation is not None and not site.name.endswith(_UNCLIPPED):
            squares = activation.statistics.mean_square / np.square(divisors, dtype=np.float64)
            scales = clipped_scales(matrix, squares, choice.weight, group)
        else:
            scales = group_scales(matrix, choice.weight, group)
        self.tensors[f"{site.name}.weight_scales"] = scales
        if self.recipe.rounding == "gptq" and activation is not None and choice.weight != "fp8":
            steps = np.broadcast_to(spread_groups(scales, group, matrix.shape[1]), matrix.shape)
            codes = np.empty(matrix.shape, np.int8)
            for block in channel_blocks(matrix.shape[1]):
                rounding = self._rounding(activation, divisors, block)
                codes[:, block] = rounding.round(matrix[:, block], steps[:, block], choice.weight)
            self.tensors[f"{site.name}.weight_codes"] = codes
        found = outliers(np.abs(matrix).max(1), site.name, "weight row")
        return found + outliers(np.abs(self._matrix(site)).max(0), site.name, "weight column")

    def _rounding(self, activation: Activation, divisors: Array, block: slice) -> CompensatedRounding:
        """For a block of input channels; kept until another is asked for: q, k and v share it."""
        key = (id(activation), divisors.tobytes(), block.start)
        if self._kept_rounding is None or self._kept_rounding[0] != key:
            self._kept_rounding = None  # its memory first
            self._kept_rounding = (key, CompensatedRounding(activation.second_moments(divisors, block)))
        return self._kept_rounding[1]

    def _activations(self, site: LinearSite, choice: SitePlan, ranges: dict[tuple[int, bytes, str], float]) -> None:
        """The static scale of the input, once for all that read it."""
        if choice.activation is None:
            return
        activation = self.inputs[site.name]
        divisors = self.columns.get(site.name, np.ones(activation.channels, np.float32))
        key = (id(activation), divisors.tobytes(), choice.activation)
        if key not in ranges:
            recipe = self.recipe
            if recipe.activation_range == "minmax":
                largest = float((activation.statistics.largest / divisors).max())
            else:
                found = activation.histogram(divisors)
                largest = choose_range(found, recipe.activation_range, choice.activation, recipe.percentile)
            ranges[key] = scale_of(largest, choice.activation)
        self.tensors[f"{site.name}.input_scale"] = np.array(ranges[key], np.float32)

    def _input_outliers(self) -> list[Outlier]:
        found: list[Outlier] = []
        seen: set[int] = set()
        for name, activation in self.inputs.items():
            if id(activation) not in seen:
                seen.add(id(activation))
                found += outliers(activation.statistics.largest, name, "input")
        return found
