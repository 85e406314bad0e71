"""The accuracy report as one page that needs nothing else, no network, no script; the refusal that points to it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qwenforge.engine.accuracy_plots import coverage_plot, divergence_plot, frontier_plot, layers_plot, size_plot
from qwenforge.engine.accuracy_report import QuantizationOutcome
from qwenforge.engine.units import size, thousands
from qwenforge.errors import AccuracyError
from qwenforge.text_file import replace_text

_TEMPLATE = "accuracy.html.jinja"


def accuracy_page(outcome: QuantizationOutcome) -> str:
    """The page for ``outcome``, in HTML with the plots inside.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters.update(thousands=thousands, size=size, decibels=lambda value: f"{value:.1f}")
    record = outcome.record()
    return environment.get_template(_TEMPLATE).render(
        outcome=outcome,
        record=record,
        figures=outcome.run.distributions,
        worst={layer.name for layer in outcome.run.worst()},
        kept={name: plan.reason for name, plan in outcome.plan.sites.items() if plan.reason},
        plots=[(title, base64.b64encode(svg.encode()).decode()) for title, svg in _plots(outcome)],
        ratio=outcome.unquantized_bytes / max(1, outcome.quantized_bytes),
    )


def _plots(outcome: QuantizationOutcome) -> list[tuple[str, str]]:
    """Titles and SVG documents."""
    figures, run = outcome.run.distributions, outcome.run
    plots = [
        ("Error of each layer", layers_plot(run.layers, [layer.name for layer in run.worst()])),
        (
            "Divergence of next-token distributions",
            divergence_plot(figures.kl_histogram, figures.mean_kl, figures.p99_kl),
        ),
    ]
    if outcome.coverage:
        plots.append(("Expert coverage in calibration", coverage_plot(outcome.coverage, outcome.recipe.expert_floor)))
    plots.append(("Size of the weights", size_plot(outcome.unquantized_bytes, outcome.quantized_bytes)))
    if outcome.frontier is not None:
        plots.append(("Size and accuracy of the choices weighed", frontier_plot(outcome.frontier, outcome.budget.kl)))
    return plots


def refuse_beyond_budget(outcome: QuantizationOutcome, output: Path) -> None:
    """Raise AccuracyError when ``outcome`` misses its budget, its report written beside ``output``.

    The report is ``OUTPUT.accuracy.html`` and ``OUTPUT.accuracy.json``; each appears whole or not at all and replaces
    that of an earlier export.
    """
    if not outcome.missed:
        return
    page = output.with_name(f"{output.name}.accuracy.html")
    figures = json.dumps(outcome.to_json(), indent=1, allow_nan=False) + "\n"
    for path, text in ((page.with_suffix(".json"), figures), (page, accuracy_page(outcome))):
        replace_text(path, text, advice="; choose another path for the bundle")
    raise AccuracyError(outcome.refusal(str(page)))
