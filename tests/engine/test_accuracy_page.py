"""The report's table against the budget, and plots of models of any depth."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from qwenforge.calibration.accuracy import HISTOGRAM_EDGES, DistributionAccuracy, LayerAccuracy
from qwenforge.calibration.budget import Budget
from qwenforge.engine.accuracy_page import budget_lines
from qwenforge.engine.accuracy_plots import coverage_plot, divergence_plot, layers_plot
from qwenforge.engine.units import decibels

GOOD = DistributionAccuracy(100, 10.0, 10.1, 0.01, 0.1, 0.2, 0.98, ())
BUDGET = Budget(kl=0.02, ppl=1.02, top1=0.96)


def words(svg: str) -> list[str]:
    """Every text of an SVG document."""
    root = ElementTree.fromstring(svg)
    return ["".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")]


def layer(index: int) -> LayerAccuracy:
    return LayerAccuracy(f"model.layers.{index}", 30.0 + index % 7, 0.999, 29.0, 0.998)


def test_each_graph_is_beside_the_budget_and_only_what_is_beyond_it_is_marked() -> None:
    graphs = {"model.onnx": GOOD, "prefill.onnx": replace(GOOD, mean_kl=0.04, perplexity=9.9)}
    kl, ratio, agreement, *rest = budget_lines(graphs, BUDGET)
    assert [(value.text, value.holds) for value in kl.values] == [("0.01", True), ("0.04", False)]
    assert kl.used == pytest.approx(2.0) and not kl.holds
    assert [value.text for value in ratio.values] == ["1.0100", "0.9900"]
    assert ratio.used == pytest.approx(0.5) and ratio.holds
    assert (agreement.limit, agreement.used) == ("≥ 96.0%", pytest.approx(0.5))
    assert all(line.holds and line.used is None and not line.limit for line in rest)


def test_limit_that_allows_nothing_has_no_part_that_is_used() -> None:
    lines = budget_lines({"model.onnx": replace(GOOD, perplexity=10.0)}, Budget(kl=0.0, ppl=1.0, top1=1.0))
    assert [(line.used, line.holds) for line in lines[:3]] == [(None, False), (None, True), (None, False)]


@pytest.mark.parametrize(("count", "numbered"), [(3, 3), (28, 28), (80, 20)])
def test_layers_of_any_depth_are_drawn_and_numbered(count: int, numbered: int) -> None:
    svg = layers_plot([layer(index) for index in range(count)], ["model.layers.0"])
    labels = [str(index) for index in range(0, count, math.ceil(count / numbered))]
    found = words(svg)
    assert found[: len(labels)] == labels
    assert {"layer", "SQNR, dB", "its own error", "the worst", "with the layers before it"} <= set(found)


def test_experts_below_the_floor_are_numbered_and_none_stands_at_zero() -> None:
    found = words(coverage_plot({"model.layers.0.mlp.experts": [0, 500, 31, 32, 90000]}, 32))
    assert "0, 2" in found and "floor, 32 tokens" in found
    assert {"0", "1", "10", "100", "1000", "10k", "100k"} <= set(found)


def test_plots_change_their_colors_where_the_system_is_dark() -> None:
    counts = [0] * (len(HISTOGRAM_EDGES) - 1)
    counts[20] = 5
    svg = divergence_plot(counts, 1e-3, 2e-3)
    ElementTree.fromstring(svg)
    assert "@media (prefers-color-scheme: dark)" in svg and 'fill: #1b1f24"] { fill: #e6e9ec !important }' in svg
    assert 'style="' in svg and "fill: #1b1f24" in svg.partition("</style>")[2]


def test_decibels_without_any_error_and_of_nothing_are_words() -> None:
    assert [decibels(value) for value in (21.46, math.inf, math.nan)] == ["21.5", "exact", "not finite"]
