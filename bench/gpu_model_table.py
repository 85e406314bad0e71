"""Rows of :mod:`qwenforge.bench.gpu_model_runs` in words: a line each, and whether the targets were met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OURS = "qwenforge"
ITL_TARGET = 1.25
"""Inter-token latency of 7B at batch 1, over reading its weights once at the copy bandwidth."""
TARGET_MODEL, TARGET_BATCH = "7b", 1


def line(row: dict[str, Any]) -> str:
    """``7b qwenforge B=1: TTFT 20.0 ms, ITL 4.00 ms (1.10x of reading the weights), 250 tokens/s, 16.0 GB``."""
    batch = f" B={row['batch']}" if "batch" in row else ""
    label = f"{row['model']} {row['subject']}{batch}"
    if "left_out" in row:
        return f"{label}: {row['left_out']}"
    return (
        f"{label}: TTFT {row['ttft_ms']['median']:.1f} ms, ITL {row['itl_ms']['p50']:.2f} ms "
        f"({row['itl_over_weights_floor']:.2f}x of reading the weights), "
        f"{row['tokens_per_second']['median']:.0f} tokens/s, {row['gpu_bytes'] / 1e9:.1f} GB"
    )


def targets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of 7B at batch 1 against its floor, and of every model and batch against every peer; empty without our rows."""
    said = []
    measured = [row for row in rows if "left_out" not in row]
    ours = {(row["model"], row["batch"]): row for row in measured if row["subject"] == OURS}
    target = ours.get((TARGET_MODEL, TARGET_BATCH))
    if target is not None:
        ratio = target["itl_over_weights_floor"]
        verdict = "met" if ratio <= ITL_TARGET else "missed"
        goal = f"the target of {ITL_TARGET}x is {verdict}"
        said.append(f"ITL of {TARGET_MODEL} at batch {TARGET_BATCH}: {ratio:.2f}x of reading the weights, {goal}")
    for (model, batch), row in ours.items():
        peers = [
            other
            for other in measured
            if (other["model"], other["batch"]) == (model, batch) and not other["subject"].startswith(OURS)
        ]
        if peers:
            first = min(peers, key=lambda one: one["ttft_ms"]["median"])
            step = min(peers, key=lambda one: one["itl_ms"]["p50"])
            said.append(
                f"{model} B={batch}: TTFT {first['ttft_ms']['median'] / row['ttft_ms']['median']:.2f}x faster than "
                f"{first['subject']}, ITL {step['itl_ms']['p50'] / row['itl_ms']['p50']:.2f}x than {step['subject']}"
            )
    return said


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every row's line, and the targets."""
    return [*map(line, rows), *targets(rows)]
