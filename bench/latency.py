"""Latency of a bundle, alone or against peers: interleaved runs in one sitting, medians, spread and ratios.

Every subject is loaded in its own process; runs alternate between subjects so that a drift of the machine's speed meets
all of them. The first runs warm up and are not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from qwenforge.bench.measured_process import MeasuredProcess

WARM_UP_RUNS = 1


@dataclass(frozen=True)
class Workload:
    """What each run does.

    Attributes:
        prompt_tokens: tokens of each prompt, random and the same for every subject.
        new_tokens: tokens generated for each prompt.
        batch: prompts at once.
        runs: counted runs.
        threads: CPU threads of each engine.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    batch: int = 1
    runs: int = 5
    threads: int = 2


@dataclass(frozen=True)
class SubjectSpec:
    """A subject to start: its name in ``subjects.SUBJECTS`` and its constructor's arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median of a figure with its smallest and largest value over the runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of ``values``."""
        return cls(float(np.median(values)), float(min(values)), float(max(values)))


@dataclass(frozen=True)
class Measurement:
    """One subject's figures; times in milliseconds.

    Attributes:
        description: the subject.
        ttft_ms: time to first token of each run.
        itl_ms: percentiles (p50, p90, p99) of the inter-token latency over all steps of all runs.
        tokens_per_second: generated tokens a second while decoding, all prompts together.
        peak_rss_bytes: largest memory of the subject's process.
        steps_ms: every inter-token latency of every run.
    """

    description: str
    ttft_ms: Spread
    itl_ms: dict[str, float]
    tokens_per_second: Spread
    peak_rss_bytes: int
    steps_ms: list[list[float]] = field(repr=False, default_factory=list)


def measure(
    specs: Sequence[SubjectSpec], workload: Workload, *, progress: Callable[[str], None] | None = None
) -> list[Measurement]:
    """Measure every subject on the same prompts, in alternating runs.

    Raises:
        UserError: a subject cannot be loaded or asked for such a run.
        RuntimeError: a subject's process ended by itself.
    """
    tell = progress or (lambda _: None)
    with _Workers() as workers:
        for spec in specs:
            tell(f"loading {spec.name}")
            workers.start(spec)
        samples: list[list[list[float]]] = [[] for _ in specs]
        memory = [0] * len(specs)
        for run in range(WARM_UP_RUNS + workload.runs):
            for index, spec in enumerate(specs):
                counted = run - WARM_UP_RUNS + 1
                tell(f"{spec.name}: " + (f"run {counted} of {workload.runs}" if counted > 0 else "warm-up"))
                result = workers.run(index, workload, seed=run)
                memory[index] = int(result["peak_rss_bytes"])
                if counted > 0:
                    samples[index].append(cast("list[float]", result["times"]))
        return [
            summary(description, times, workload, peak)
            for description, times, peak in zip(workers.descriptions, samples, memory, strict=True)
        ]


def summary(description: str, runs: list[list[float]], workload: Workload, peak: int) -> Measurement:
    times: npt.NDArray[np.float64] = np.array(runs) * 1e3
    steps = np.diff(times, axis=1)
    first, decode = steps[:, 0], steps[:, 1:]
    rates = [workload.batch * len(row) / (row.sum() / 1e3) for row in decode if len(row)]
    percentiles = {f"p{p}": float(np.percentile(decode, p)) for p in (50, 90, 99)} if decode.size else {}
    return Measurement(
        description=description,
        ttft_ms=Spread.of(first.tolist()),
        itl_ms=percentiles,
        tokens_per_second=Spread.of(rates) if rates else Spread(0.0, 0.0, 0.0),
        peak_rss_bytes=peak,
        steps_ms=decode.tolist(),
    )


class _Workers(ExitStack):
    """The subjects' processes; they end with the context."""

    def __init__(self) -> None:
        super().__init__()
        self._processes: list[MeasuredProcess] = []
        self.descriptions: list[str] = []

    def start(self, spec: SubjectSpec) -> None:
        command = [sys.executable, "-m", "qwenforge.bench.worker"]
        process = self.enter_context(MeasuredProcess(command, spec.name, spec.arguments))
        self._processes.append(process)
        self.descriptions.append(process.description)

    def run(self, index: int, workload: Workload, *, seed: int) -> dict[str, Any]:
        times, peak = self._processes[index].run(
            prompt_tokens=workload.prompt_tokens, new_tokens=workload.new_tokens, batch=workload.batch, seed=seed
        )
        return {"times": times, "peak_rss_bytes": peak}
