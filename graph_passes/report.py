"""The story of a pipeline run for people (a table) and for scripts (a JSON object)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwenforge.graph_passes.pipeline import PipelineResult, Step
from qwenforge.graph_passes.scenario import Skipped

if TYPE_CHECKING:
    from rich.table import Table


def as_json(result: PipelineResult, *, skipped: Sequence[Skipped] = ()) -> dict[str, Any]:
    """A JSON object: ``nodes_before``, ``nodes_after``, ``refused`` (rule names), ``rules`` (one object a step, with
    the fields of :class:`~qwenforge.graph_passes.pipeline.Step`) and ``skipped_scenarios``."""
    return {
        "nodes_before": result.steps[0].nodes_before if result.steps else result.model.graph.num_nodes(),
        "nodes_after": result.model.graph.num_nodes(),
        "refused": [step.rule for step in result.refused],
        "rules": [_step(step) for step in result.steps],
        "skipped_scenarios": [{"scenario": each.scenario, "reason": each.reason} for each in skipped],
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "rule": step.rule,
        "matches": step.matches,
        "nodes_before": step.nodes_before,
        "nodes_after": step.nodes_after,
        "error": step.error if step.error is None or step.error < float("inf") else "infinite",
        "accepted": step.accepted,
        "reason": step.reason,
    }


def as_table(result: PipelineResult) -> Table:
    """One row a rule: its matches, the nodes before and after it, and the largest relative error."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("rule", no_wrap=True)
    for heading in ("matches", "nodes before", "nodes after", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for step in result.steps:
        error = "" if step.error is None else f"{step.error:.1e}"
        counts = (str(step.matches), str(step.nodes_before), str(step.nodes_after))
        table.add_row(step.rule, *counts, error, _verdict(step), style="" if step.accepted else "red")
    return table


def _verdict(step: Step) -> str:
    if not step.accepted:
        return "refused"
    return "applied" if step.matches else "no match"


def notes(result: PipelineResult, *, skipped: Sequence[Skipped] = ()) -> list[str]:
    """One line for each look-alike that a rule left alone, each refused rule and each scenario not run."""
    lines = [
        f"{'REFUSED' if not step.accepted else 'note'}: rule {step.rule}: {step.reason}"
        for step in result.steps
        if step.reason
    ]
    return lines + [f"not verified: {each.scenario}: {each.reason}" for each in skipped]
