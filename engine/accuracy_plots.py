"""The plots of the accuracy report, each an SVG document of its own.

matplotlib is used by its objects, without pyplot's global state; fonts are the reader's, and the same figures give the
same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwenforge.calibration.accuracy import HISTOGRAM_EDGES, LayerAccuracy
from qwenforge.calibration.sensitivity import Frontier
from qwenforge.engine.units import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

_INK, _SOFT, _BAD = "#1b1f24", "#8b96a1", "#a8330f"
_OWN, _ACCUMULATED = "#0b6e5a", "#7cc4b0"
_IN_THE_DARK = {_INK: "#e6e9ec", _SOFT: "#98a3ae", _BAD: "#ff9d7a", _OWN: "#5fd0b4", _ACCUMULATED: "#2f7866"}
"""What each color becomes where the reader's system is dark, as the page around the plots does."""
NARROW_LAYERS = 12
"""Layers up to which their plot takes one column of the page; more take its width."""
_NUMBERED_LAYERS = 48
_WIDTH, _FULL_WIDTH = 5.2, 11.0
_NEVER = 0.3
"""Where an expert that no token was given to stands on the logarithmic axis; its tick says 0."""
_NUMBERED_EXPERTS = 4
_NO_ERROR = 1e-8
"""Nats below which rounding in the comparison is all that there is."""
_STYLE: Any = {
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
_LEGEND: Any = {"frameon": False, "fontsize": 9}


def layers_plot(layers: Sequence[LayerAccuracy], worst: Sequence[str]) -> str:
    """Bars of each layer's own and accumulated error, as SQNR in dB; the ``worst`` layers stand out."""
    from matplotlib.patches import Patch

    with _figure(_WIDTH if len(layers) <= NARROW_LAYERS else _FULL_WIDTH, 3.2) as (figure, axes):
        places = np.arange(len(layers))
        own = [_shown(layer.own_sqnr_db, layers) for layer in layers]
        accumulated = [_shown(layer.sqnr_db, layers) for layer in layers]
        colors = [_BAD if layer.name in worst else _OWN for layer in layers]
        axes.bar(places - 0.2, own, 0.4, color=colors)
        axes.bar(places + 0.2, accumulated, 0.4, color=_ACCUMULATED)
        step = 1 if len(layers) <= _NUMBERED_LAYERS else 4
        axes.set_xticks(places[::step], [layer.name.rpartition(".")[2] for layer in layers[::step]], fontsize=9)
        axes.margins(x=0.01 if len(layers) > NARROW_LAYERS else 0.05)
        axes.set_xlabel("layer")
        axes.set_ylabel("SQNR, dB")
        meaning = {_OWN: "its own error", _BAD: "the worst", _ACCUMULATED: "with the layers before it"}
        patches = [Patch(color=color, label=label) for color, label in meaning.items()]
        figure.legend(handles=patches, loc="outside upper right", ncols=3, **_LEGEND)
        return _svg(figure)


def _shown(decibels: float, layers: Sequence[LayerAccuracy]) -> float:
    """A bar's height: no error at all is drawn as the least error seen, and what is not finite as none."""
    if math.isnan(decibels):
        return 0.0
    finite = [value for layer in layers for value in (layer.own_sqnr_db, layer.sqnr_db) if math.isfinite(value)]
    return min(decibels, max(finite, default=0.0))


def divergence_plot(histogram: Sequence[int], mean: float, p99: float) -> str:
    """Positions by their KL divergence, on a logarithmic axis, with the mean and the 99th percentile."""
    with _figure(_WIDTH, 3.2) as (figure, axes):
        inner = HISTOGRAM_EDGES[1:-1]
        edges = np.concatenate([[inner[0] / 2], inner, [inner[-1] * 2]])
        axes.stairs(histogram, edges, fill=True, color=_ACCUMULATED)
        axes.set_xscale("log")
        axes.set_xlim(*_decades(edges, np.asarray(histogram)))
        for value, name, color in ((mean, "mean", _OWN), (p99, "99th percentile", _BAD)):
            if value > 0:
                axes.axvline(value, color=color, linewidth=1.6, label=f"{name} {value:.2g}")
        axes.set_xlabel("KL of a position, nats")
        axes.set_ylabel("positions")
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper right", ncols=2, **_LEGEND)
        return _svg(figure)


def _decades(edges: Floats, histogram: Floats) -> tuple[float, float]:
    """Whole powers of ten around what the histogram holds, three at least."""
    held = np.flatnonzero(histogram)
    if not len(held):
        return float(edges[0]), float(edges[-1])
    low, high = math.floor(math.log10(edges[held[0]])), math.ceil(math.log10(edges[held[-1] + 1]))
    return 10.0 ** min(low, high - 3), 10.0**high


def coverage_plot(coverage: Mapping[str, Sequence[int]], floor: int) -> str:
    """Tokens that each expert was given in calibration, one row of dots a layer, and the floor."""
    few = len(coverage) <= NARROW_LAYERS
    with _figure(_WIDTH, max(2.4, (0.3 if few else 0.16) * len(coverage) + 1.4)) as (figure, axes):
        for row, counts in enumerate(coverage.values()):
            tokens = np.asarray(counts, float)
            values = np.maximum(tokens, _NEVER)
            below = tokens < floor
            axes.scatter(
                values[~below], np.full((~below).sum(), row), s=30 if few else 12, color=_OWN, alpha=0.6, linewidths=0
            )
            axes.scatter(values[below], np.full(below.sum(), row), s=40 if few else 16, color=_BAD, linewidths=0)
            if few:
                _number_experts(axes, row, values, below)
        axes.axvline(floor, color=_BAD, linewidth=1.2, linestyle="--", label=f"floor, {floor} tokens")
        most = max((max(counts) for counts in coverage.values()), default=0)
        axes.set_xscale("log")
        axes.set_xlim(_NEVER / 1.6, 10 ** math.ceil(math.log10(max(most, floor, 1)) + 0.05))
        powers = range(math.ceil(math.log10(max(most, floor, 1))) + 1)
        axes.set_xticks([_NEVER, *(10**power for power in powers)], ["0", *(_power_of_ten(power) for power in powers)])
        axes.minorticks_off()
        axes.set_yticks(range(len(coverage)), [site.split(".")[2] for site in coverage], fontsize=9 if few else 7)
        axes.set_ylim(len(coverage) - 0.4, -0.6)
        axes.grid(axis="y", color=_SOFT, linewidth=0.3)
        axes.set_xlabel("tokens given to an expert")
        axes.set_ylabel("layer")
        figure.legend(loc="outside upper right", **_LEGEND)
        return _svg(figure)


def _power_of_ten(power: int) -> str:
    """``1000``, ``10k``, ``1M``."""
    return str(10**power) if power < 4 else f"{10 ** (power - 3)}k" if power < 6 else f"{10 ** (power - 6)}M"


def _number_experts(axes: Axes, row: int, values: Floats, below: npt.NDArray[np.bool_]) -> None:
    """The numbers of a layer's experts below the floor, above the first of their dots."""
    numbers = np.flatnonzero(below)
    if len(numbers):
        more = f" +{len(numbers) - _NUMBERED_EXPERTS}" if len(numbers) > _NUMBERED_EXPERTS else ""
        text = ", ".join(map(str, numbers[:_NUMBERED_EXPERTS])) + more
        place = (float(values[below].min()), row)
        axes.annotate(text, place, xytext=(-4, 5), textcoords="offset points", fontsize=8, color=_BAD)


def size_plot(unquantized: int, quantized: int) -> str:
    """Both models' bytes of weights."""
    with _figure(_WIDTH, 1.6) as (figure, axes):
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
    with _figure(_WIDTH, 3.2) as (figure, axes):
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
        figure.legend(loc="outside upper right", ncols=2, **_LEGEND)
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
    head, tag, rest = text.getvalue().partition("<defs>")
    return f"{head}<style>{_dark_style()}</style>{tag}{rest}"


def _dark_style() -> str:
    """Rules that win over the styles which matplotlib writes on every element."""
    rules = (
        f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}'
        for light, dark in _IN_THE_DARK.items()
        for part in ("fill", "stroke")
    )
    return f"@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}"
