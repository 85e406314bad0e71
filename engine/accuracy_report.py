"""What became of a quantized export: figures as JSON, the manifest's record, and a sentence when it failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenforge.calibration.accuracy import DistributionAccuracy, LayerAccuracy
from qwenforge.calibration.budget import Budget
from qwenforge.calibration.recipes import Recipe
from qwenforge.calibration.sensitivity import Frontier
from qwenforge.engine.accuracy_run import AccuracyRun
from qwenforge.graph_passes.quantize.plan import QuantizationPlan
from qwenforge.manifest import QuantizationRecord, QuantizedSites

REPORT_VERSION = 1


@dataclass(frozen=True)
class QuantizationOutcome:
    """Everything that is reported of a quantized export.

    Attributes:
        model: the checkpoint's name.
        target, dtype: what it was lowered to.
        recipe: as used, the overrides found by ``--auto`` included.
        plan: what was done to each site.
        run: how far it is from the unquantized model.
        budget: what that was held to.
        unquantized_bytes, quantized_bytes: of weights, in the unquantized portable model and as lowered.
        calibrated_on: the text; None where the recipe needs none.
        coverage: by expert site, the tokens that each of its experts was given in calibration.
        warnings: what calibration and the reading of texts found doubtful, a sentence each.
        frontier: size and accuracy of the choices that ``--auto`` weighed; None without it.
    """

    model: str
    target: str
    dtype: str
    recipe: Recipe
    plan: QuantizationPlan
    run: AccuracyRun
    budget: Budget
    unquantized_bytes: int
    quantized_bytes: int
    calibrated_on: str | None
    coverage: Mapping[str, tuple[int, ...]]
    warnings: tuple[str, ...]
    frontier: Frontier | None = None

    @property
    def missed(self) -> list[str]:
        """What is beyond the budget, each as half a sentence; of several graphs, each limit by the worst."""
        return self.budget.missed(*self.run.graphs.values())

    def refusal(self, report: str) -> str:
        """Why no bundle is written, in one sentence with the three worst layers; ``report`` says where more is."""
        worst = ", ".join(described(layer) for layer in self.run.worst())
        pattern = f"{self.run.worst(1)[0].name}.*=keep"
        found = self.run
        warned = f" and {len(self.warnings)} warning{'s' * (len(self.warnings) > 1)}" if self.warnings else ""
        doubt = f" (first of all: {self.warnings[0]})" if self.warnings else ""
        return (
            f"recipe {self.recipe.name} misses its budget on {found.windows} windows of {found.source}: "
            f"{'; '.join(self.missed)}; the worst layers are {worst}; no bundle was written, {report} has the whole "
            f"report{warned}{doubt}; leave layers in higher precision (--override '{pattern}', or --auto), choose "
            "another recipe, or allow more with --budget"
        )

    def record(self) -> QuantizationRecord:
        """The manifest's part."""
        counts: Counter[tuple[str, int | None, str | None]] = Counter(
            (plan.weight or "kept", plan.group_size, plan.activation) for plan in self.plan.sites.values()
        )
        caches = {plan.format for plan in self.plan.caches.values()}
        return QuantizationRecord(
            recipe=self.recipe.name,
            sites=recorded_sites(counts),
            cache=caches.pop() if len(caches) == 1 else None,
            calibrated_on=self.calibrated_on,
            judged_on=self.run.source,
            budget=self.budget.to_json(),
            accuracy=recorded_accuracy(self.run.distributions),
        )

    def to_json(self) -> dict[str, Any]:
        """The report; ``accuracy.json`` holds it under ``quantization``."""
        run = self.run
        return {
            "version": REPORT_VERSION,
            "model": self.model,
            "target": self.target,
            "dtype": self.dtype,
            "recipe": self.recipe.model_dump(mode="json"),
            "sites": {name: plan.model_dump(mode="json") for name, plan in self.plan.sites.items()},
            "caches": {name: plan.model_dump(mode="json") for name, plan in self.plan.caches.items()},
            "smoothed": list(self.plan.smoothed),
            "calibrated_on": self.calibrated_on,
            "held_out": {
                "text": run.source,
                "windows": run.windows,
                "tokens_in_window": run.window_tokens,
                "windows_left_out_as_calibration_text": run.overlapping,
            },
            "method": run.method,
            "accuracy": run.distributions.to_json(),
            "graphs": {name: figures.to_json() for name, figures in run.graphs.items()},
            "budget": self.budget.to_json(),
            "missed": self.missed,
            "layers": [layer.to_json() for layer in run.layers],
            "worst_layers": [layer.name for layer in run.worst()],
            "expert_floor": self.recipe.expert_floor,
            "expert_tokens": {site: list(counts) for site, counts in self.coverage.items()},
            "bytes": {"unquantized": self.unquantized_bytes, "quantized": self.quantized_bytes},
            "warnings": list(self.warnings),
            "frontier": None if self.frontier is None else self.frontier.to_json(),
        }


def recorded_sites(counts: Counter[tuple[str, int | None, str | None]]) -> tuple[QuantizedSites, ...]:
    """How many sites have each (weight format, group size, activation format), for the manifest."""
    return tuple(
        QuantizedSites(weight=weight, group_size=group, activation=activation, sites=count)
        for (weight, group, activation), count in counts.most_common()
    )


def recorded_accuracy(figures: DistributionAccuracy) -> dict[str, float]:
    """What the manifest has of the measured distances."""
    return {
        "mean_kl": figures.mean_kl,
        "p99_kl": figures.p99_kl,
        "perplexity_ratio": figures.perplexity_ratio,
        "top1_agreement": figures.top1_agreement,
    }


def described(layer: LayerAccuracy) -> str:
    """``model.layers.3 (SQNR 21.5 dB)``."""
    return f"{layer.name} (SQNR {layer.own_sqnr_db:.1f} dB)" if layer.finite else f"{layer.name} (not finite)"
