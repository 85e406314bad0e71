"""The plots of the accuracy report, each an SVG document of its own.

matplotlib is used by its objects, without pyplot's global state; fonts are the reader's, and the same figures give the
same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from qwenforge.calibration.accuracy import HISTOGRAM_EDGES, LayerAccuracy
from qwenforge.calibration.sensitivity import Frontier
from qwenforge.engine.units import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _SOFT, _BAD = "#1b1f24", "#8b96a1", "#a8330f"
_OWN, _ACCUMULATED = "#0b6e5a", "#7cc4b0"
_NO_ERROR = 1e-8
"""Nats below which rounding in the comparison is all that there is."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qwenforge",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def layers_plot(layers: Sequence[LayerAccuracy], worst: Sequence[str]) -> str:
    """Bars of each layer's own and accumulated error, as SQNR in dB; the ``worst`` layers stand out."""
    from matplotlib.patches import Patch

    with _figure(max(6.0, 0.28 * len(layers) + 2), 3.2) as (figure, axes):
        places = np.arange(len(layers))
        own = [_shown(layer.own_sqnr_db, layers) for layer in layers]
        accumulated = [_shown(layer.sqnr_db, layers) for layer in layers]
        colors = [_BAD if layer.name in worst else _OWN for layer in layers]
        axes.bar(places - 0.2, own, 0.4, color=colors)
        axes.bar(places + 0.2, accumulated, 0.4, color=_ACCUMULATED)
        axes.set_xticks(places, [layer.name.rpartition(".")[2] for layer in layers], fontsize=8)
        axes.set_xlabel("layer")
        axes.set_ylabel("SQNR (dB), higher is better")
        meaning = {_OWN: "its own error", _BAD: "the worst", _ACCUMULATED: "with the layers before it"}
        patches = [Patch(color=color, label=label) for color, label in meaning.items()]
        axes.legend(handles=patches, frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 1.18), ncols=3)
        return _svg(figure)


def _shown(decibels: float, layers: Sequence[LayerAccuracy]) -> float:
    """A bar's height: no error at all is drawn as the least error seen, and what is not finite as none."""
    if math.isnan(decibels):
        return 0.0
    finite = [value for layer in layers for value in (layer.own_sqnr_db, layer.sqnr_db) if math.isfinite(value)]
    return min(decibels, max(finite, default=0.0))


def divergence_plot(histogram: Sequence[int], mean: float, p99: float) -> str:
    """Positions by their KL divergence, on a logarithmic axis, with the mean and the 99th percentile."""
    with _figure(6.0, 3.2) as (figure, axes):
        inner = HISTOGRAM_EDGES[1:-1]
        edges = np.concatenate([[inner[0] / 2], inner, [inner[-1] * 2]])
        axes.stairs(histogram, edges, fill=True, color=_ACCUMULATED)
        axes.set_xscale("log")
        for value, name, color in ((mean, "mean", _OWN), (p99, "99th percentile", _BAD)):
            if value > 0:
                axes.axvline(value, color=color, linewidth=1.2, label=f"{name} {value:.2g}")
        axes.set_xlabel("KL(unquantized || quantized) of a position, nats")
        axes.set_ylabel("positions")
        axes.legend(frameon=False, fontsize=9)
        return _svg(figure)


def coverage_plot(coverage: Mapping[str, Sequence[int]], floor: int) -> str:
    """Tokens that each expert was given in calibration, one row of dots a layer, and the floor."""
    with _figure(6.0, max(2.2, 0.32 * len(coverage) + 1.4)) as (figure, axes):
        for row, counts in enumerate(coverage.values()):
            values = np.maximum(np.asarray(counts, float), 0.5)  # an expert that never fired stands at one half
            below = np.asarray(counts) < floor
            axes.scatter(values[~below], np.full((~below).sum(), row), s=12, color=_OWN, alpha=0.6, linewidths=0)
            axes.scatter(values[below], np.full(below.sum(), row), s=18, color=_BAD, linewidths=0)
        axes.axvline(floor, color=_BAD, linewidth=1, linestyle="--", label=f"floor, {floor} tokens")
        axes.set_xscale("log")
        axes.set_yticks(range(len(coverage)), [site.split(".")[2] for site in coverage], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("tokens of an expert in calibration (one half: none)")
        axes.set_ylabel("layer")
        axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1))
        return _svg(figure)


def size_plot(unquantized: int, quantized: int) -> str:
    """Both models' bytes of weights."""
    with _figure(6.0, 1.6) as (figure, axes):
        values = [unquantized, quantized]
        bars = axes.barh(["unquantized", "quantized"], values, color=[_ACCUMULATED, _OWN], height=0.6)
        axes.bar_label(bars, [size(value) for value in values], padding=4, fontsize=9)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0.18)
        return _svg(figure)


def frontier_plot(frontier: Frontier, limit: float) -> str:
    """Size and mean KL of each choice that ``--auto`` measured, the ``limit`` on the latter, and what was chosen."""
    with _figure(6.0, 3.2) as (figure, axes):
        chosen = frontier.points[frontier.chosen]
        # Without any error a point has no place on the axis.
        points = [point for point in frontier.points if point.accuracy.mean_kl > _NO_ERROR or point is chosen]
        sizes = [point.bytes / 1e6 for point in points]
        divergences = [max(point.accuracy.mean_kl, _NO_ERROR) for point in points]
        colors = [_OWN if point.holds else _BAD for point in points]
        axes.plot(sizes, divergences, color=_SOFT, linewidth=0.8, zorder=1)
        axes.scatter(sizes, divergences, s=24, color=colors, zorder=2)
        place = points.index(chosen)
        axes.scatter(sizes[place], divergences[place], s=110, facecolors="none", edgecolors=_INK, label="chosen")
        axes.axhline(limit, color=_BAD, linewidth=1, linestyle="--", label="budget")
        axes.set_yscale("log")
        axes.set_xlabel("quantizable weights, MB")
        axes.set_ylabel("mean KL, nats")
        axes.legend(frameon=False, fontsize=9)
        return _svg(figure)


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()
