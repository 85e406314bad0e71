"""The measurement: its arithmetic on given times, its order, and what becomes of its processes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenforge.bench import latency
from qwenforge.bench.latency import Spread, SubjectSpec, Workload, measure
from qwenforge.errors import UserError

PARTS_PER_BILLION = 1e-9
"""Times are differences of doubles: equal but for their last digits."""


def times_of(first: float, steps: list[float], *, start: float = 100.0) -> list[float]:
    """What a subject answers, in seconds, for a first token after ``first`` and later ones ``steps`` apart, in ms."""
    return (start + np.cumsum([0.0, first, *steps]) / 1e3).tolist()  # type: ignore[no-any-return]


def test_percentiles_are_those_of_all_steps_of_all_runs() -> None:
    generator = np.random.default_rng(3)
    steps = generator.lognormal(3, 0.7, (5, 63))
    runs = [times_of(50.0 + run, row.tolist(), start=run * 1000.0) for run, row in enumerate(steps)]
    found = latency.summary("x", runs, Workload(new_tokens=64), peak=7)
    assert list(found.itl_ms) == ["p50", "p90", "p99"]
    expected = np.percentile(steps.ravel(), [50, 90, 99])
    assert list(found.itl_ms.values()) == pytest.approx(expected.tolist(), rel=PARTS_PER_BILLION)
    assert np.array(found.steps_ms) == pytest.approx(steps, rel=PARTS_PER_BILLION)
    assert (found.description, found.peak_rss_bytes) == ("x", 7)


def test_percentiles_of_one_to_a_hundred_milliseconds() -> None:
    found = latency.summary("x", [times_of(1.0, [float(n) for n in range(1, 101)])], Workload(), peak=0)
    assert found.itl_ms == pytest.approx({"p50": 50.5, "p90": 90.1, "p99": 99.01}, rel=PARTS_PER_BILLION)


def test_first_token_and_decoding_are_apart() -> None:
    runs = [times_of(500.0, [10.0] * 4), times_of(400.0, [20.0] * 4), times_of(900.0, [40.0] * 4)]
    found = latency.summary("x", runs, Workload(batch=3), peak=0)
    assert vars(found.ttft_ms) == pytest.approx({"median": 500.0, "low": 400.0, "high": 900.0})
    # Three prompts get a token each at every step.
    assert vars(found.tokens_per_second) == pytest.approx({"median": 150.0, "low": 75.0, "high": 300.0})


def test_spread_is_median_and_extremes() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(median=2.5, low=1.0, high=4.0)


class FakeWorkers:
    """Stands in for the processes: remembers what it is asked, answers with times that tell run and subject."""

    asked: list[tuple[int, int]]

    def __init__(self) -> None:
        self.descriptions: list[str] = []
        FakeWorkers.asked = []

    def __enter__(self) -> FakeWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def start(self, spec: SubjectSpec) -> None:
        self.descriptions.append(f"the {spec.name}")

    def run(self, index: int, workload: Workload, *, seed: int) -> dict[str, Any]:
        self.asked.append((index, seed))
        slow = 1000.0 if len(self.asked) <= 2 else 1.0
        steps = [slow * (index + 1)] * (workload.new_tokens - 1)
        return {"times": times_of(10 * slow, steps), "peak_rss_bytes": 100 * len(self.asked)}


def test_runs_alternate_on_the_same_prompts_and_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_Workers", FakeWorkers)
    told: list[str] = []
    specs = [SubjectSpec("ours", {}), SubjectSpec("theirs", {})]
    ours, theirs = measure(specs, Workload(new_tokens=4, runs=2), progress=told.append)
    assert FakeWorkers.asked == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert told[:4] == ["loading ours", "loading theirs", "ours: warm-up", "theirs: warm-up"]
    assert told[4:] == ["ours: run 1 of 2", "theirs: run 1 of 2", "ours: run 2 of 2", "theirs: run 2 of 2"]
    assert (ours.description, theirs.description) == ("the ours", "the theirs")
    assert ours.itl_ms["p99"] == pytest.approx(1.0) and theirs.itl_ms["p99"] == pytest.approx(2.0)
    assert (ours.ttft_ms.high, len(ours.steps_ms)) == (pytest.approx(10.0), 2)
    assert (ours.peak_rss_bytes, theirs.peak_rss_bytes) == (500, 600), "memory is the last word, warm-up included"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """The processes that a measurement starts."""
    processes: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def remember(*args: Any, **options: Any) -> subprocess.Popen[str]:
        processes.append(start(*args, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    return processes


def spec(bundle: Path) -> SubjectSpec:
    return SubjectSpec("qwenforge", {"bundle": str(bundle), "threads": 1})


def test_measurement_of_a_bundle_is_plausible_and_ends_its_process(
    bundle: Path, started: list[subprocess.Popen[str]]
) -> None:
    (found,) = measure([spec(bundle)], Workload(prompt_tokens=6, new_tokens=5, batch=2, runs=2, threads=1))
    assert found.description == "qwenforge"
    assert [len(steps) for steps in found.steps_ms] == [4, 4]
    assert 0 < found.itl_ms["p50"] <= found.itl_ms["p90"] <= found.itl_ms["p99"]
    assert 0 < found.ttft_ms.low <= found.ttft_ms.median <= found.ttft_ms.high
    assert found.tokens_per_second.median > 0
    assert 20e6 < found.peak_rss_bytes < 2e9
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_keyboard_interrupts_do_not_reach_the_process(bundle: Path, started: list[subprocess.Popen[str]]) -> None:
    """It would answer one with a traceback of its own."""
    groups: list[int] = []

    def look(what: str) -> None:
        if what == "qwenforge: warm-up":
            groups.append(os.getpgid(started[0].pid))

    measure([spec(bundle)], Workload(prompt_tokens=4, new_tokens=2, runs=1), progress=look)
    assert groups == [started[0].pid] != [os.getpgid(0)]


def test_subject_that_cannot_be_loaded_is_a_user_error_and_ends_the_others(
    bundle: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    with pytest.raises(UserError, match=r"absent.*is not a qwenforge bundle|absent.* does not exist"):
        measure([spec(bundle), spec(tmp_path / "absent")], Workload())
    assert len(started) == 2 and None not in [process.poll() for process in started]


def test_run_that_a_subject_refuses_is_a_user_error(bundle: Path) -> None:
    with pytest.raises(UserError, match="prompt 1 has 300 tokens, at most 255 fit"):
        measure([spec(bundle)], Workload(prompt_tokens=300, new_tokens=2))


def test_process_that_ends_by_itself_is_reported_with_its_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="ended with exit code 1; its error is above"):
        measure([SubjectSpec("nobody", {})], Workload())
    assert "KeyError: 'nobody'" in capfd.readouterr().err


def test_process_killed_between_runs_is_reported(bundle: Path, started: list[subprocess.Popen[str]]) -> None:
    def kill(what: str) -> None:
        if what == "qwenforge: run 1 of 2":
            os.kill(started[0].pid, signal.SIGKILL)
            started[0].wait()

    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        measure([spec(bundle)], Workload(prompt_tokens=4, new_tokens=2, runs=2), progress=kill)
