"""The accuracy report as one page that needs nothing else, no network, no script."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qwenforge.calibration.accuracy import DistributionAccuracy
from qwenforge.calibration.budget import Budget
from qwenforge.engine.accuracy_plots import (
    NARROW_LAYERS,
    coverage_plot,
    divergence_plot,
    frontier_plot,
    layers_plot,
    size_plot,
)
from qwenforge.engine.accuracy_report import QuantizationOutcome
from qwenforge.engine.accuracy_run import AccuracyRun
from qwenforge.engine.units import decibels, size, thousands

PAGE_MARK = '<meta name="generator" content="qwenforge accuracy report">'
"""What tells a page of ours from a file of somebody else."""
_TEMPLATE = "accuracy.html.jinja"


Figure = Callable[[DistributionAccuracy], float]


@dataclass(frozen=True)
class Measured:
    """A figure of one graph as text, and whether it is within its limit."""

    text: str
    holds: bool = True


@dataclass(frozen=True)
class BudgetLine:
    """A row of the budget's table.

    Attributes:
        name: what was measured.
        values: of each judged graph.
        limit: as text; empty for what has none.
        used: fraction of what may be lost that is lost; None where there is no limit or nothing may be lost.
    """

    name: str
    values: tuple[Measured, ...]
    limit: str = ""
    used: float | None = None

    @property
    def holds(self) -> bool:
        """Whether every value is within the limit."""
        return all(value.holds for value in self.values)


@dataclass(frozen=True)
class Plot:
    """A figure of the page: ``svg`` with a title and what it shows; ``wide`` ones take a row of their own."""

    title: str
    meaning: str
    svg: str
    wide: bool = False

    @property
    def base64(self) -> str:
        """The picture as a data URL holds it."""
        return base64.b64encode(self.svg.encode()).decode()


def accuracy_page(outcome: QuantizationOutcome) -> str:
    """The page for ``outcome``, in HTML with the plots inside.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters.update(thousands=thousands, size=size, decibels=decibels)
    return environment.get_template(_TEMPLATE).render(
        mark=Markup(PAGE_MARK),
        outcome=outcome,
        record=outcome.record(),
        figures=outcome.run.distributions,
        worst=_marked(outcome.run),
        budget=budget_lines(outcome.run.graphs, outcome.budget),
        exceptions=_exceptions(outcome),
        plots=_plots(outcome),
        ratio=outcome.unquantized_bytes / max(1, outcome.quantized_bytes),
    )


def budget_lines(graphs: Mapping[str, DistributionAccuracy], budget: Budget) -> list[BudgetLine]:
    """What was measured of each graph, what has a limit first."""
    found = list(graphs.values())

    def limited(
        name: str, shown: str, limit: str, value: Figure, lost: Figure, allowed: float, holds: Callable[[float], bool]
    ) -> BudgetLine:
        values = tuple(Measured(format(value(each), shown), holds(value(each))) for each in found)
        used = max(0.0, max(map(lost, found)) / allowed) if allowed > 0 else None
        return BudgetLine(name, values, limit, used)

    def measured(name: str, shown: str, value: Figure) -> BudgetLine:
        return BudgetLine(name, tuple(Measured(format(value(each), shown)) for each in found))

    return [
        limited(
            "mean KL, nats",
            ".3g",
            f"≤ {budget.kl:g}",
            lambda each: each.mean_kl,
            lambda each: each.mean_kl,
            budget.kl,
            lambda value: value <= budget.kl,
        ),
        limited(
            "perplexity ratio",
            ".4f",
            f"≤ {budget.ppl:g}",
            lambda each: each.perplexity_ratio,
            lambda each: each.perplexity_ratio - 1,
            budget.ppl - 1,
            lambda value: value <= budget.ppl,
        ),
        limited(
            "best token agrees",
            ".1%",
            f"≥ {budget.top1:.1%}",
            lambda each: each.top1_agreement,
            lambda each: 1 - each.top1_agreement,
            1 - budget.top1,
            lambda value: value >= budget.top1,
        ),
        measured("KL, 99th percentile", ".3g", lambda each: each.p99_kl),
        measured("KL, largest", ".3g", lambda each: each.max_kl),
        measured(f"perplexity (was {found[0].reference_perplexity:.2f})", ".2f", lambda each: each.perplexity),
    ]


def _marked(run: AccuracyRun) -> list[str]:
    """The layers that stand out: the worst three, and no more than half of a shallow model's."""
    return [layer.name for layer in run.worst(max(1, min(3, len(run.layers) // 2)))]


def _exceptions(outcome: QuantizationOutcome) -> dict[str, list[str]]:
    """The sites that are not what the recipe asks for in general, by the reason."""
    found: dict[str, list[str]] = {}
    for name, plan in outcome.plan.sites.items():
        if plan.reason:
            found.setdefault(plan.reason, []).append(name)
    return found


def _plots(outcome: QuantizationOutcome) -> list[Plot]:
    figures, run = outcome.run.distributions, outcome.run
    plots = [
        Plot(
            "Error of each layer",
            "Signal to quantization noise of the residual stream behind it: higher is better.",
            layers_plot(run.layers, _marked(run)),
            wide=len(run.layers) > NARROW_LAYERS,
        ),
        Plot(
            "Divergence of next-token distributions",
            "How many positions have which KL(unquantized ‖ quantized).",
            divergence_plot(figures.kl_histogram, figures.mean_kl, figures.p99_kl),
        ),
    ]
    if outcome.coverage:
        plots.append(
            Plot(
                "Expert coverage in calibration",
                "A dot is an expert; below the floor it falls back to statistics of its weights.",
                coverage_plot(outcome.coverage, outcome.recipe.expert_floor),
            )
        )
    plots.append(
        Plot(
            "Size of the weights",
            "Of the unquantized portable model, and as written for the target.",
            size_plot(outcome.unquantized_bytes, outcome.quantized_bytes),
        )
    )
    if outcome.frontier is not None:
        plots.append(
            Plot(
                "Size and accuracy of the choices weighed",
                "What --auto measured, on other windows than those that the result is judged by.",
                frontier_plot(outcome.frontier, outcome.budget.kl),
            )
        )
    return plots
