"""Our ops among threads: fewer than tasks, sessions side by side, one session from two threads, other parts of one."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.cpu_gated_mlp_case import GatedMlpCase
from support.cpu_linear_case import LinearCase
from support.cpu_mixture_case import Form, MixtureCase
from support.cpu_reference import mlp
from support.cpu_runs import Array, Job, cpu_session

_SECONDS = 60
"""After which a hanging call is a failure; each takes a few milliseconds."""

JOBS: dict[str, Job] = {
    "linear, one row": LinearCase(columns=700, norm=True).job(),
    "linear, many rows": LinearCase(rows=600, columns=100).job(),
    "MLP, one row": GatedMlpCase(hidden=256, inner=700).job(),
    "MLP, many rows": GatedMlpCase(rows=40, hidden=256, inner=300).job(),
    "experts, one token": MixtureCase(k=4, shared=Form(300), norm=True).job(),
    "experts, many tokens": MixtureCase(tokens=40, shared=Form(100)).job(),
}


def _run(session: Any, job: Job) -> list[Array]:
    found: list[Array] = session.run(None, dict(job.feeds))
    return found


def _at_once(*tasks: Any) -> None:
    """Each in a thread of its own; fails where one has not ended in time or failed."""
    failures: list[BaseException] = []

    def guarded(task: Any) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_SECONDS)
        assert not thread.is_alive(), "a call hangs"
    for failure in failures:
        raise failure


@pytest.mark.parametrize("name", JOBS)
def test_one_thread_does_the_tasks_of_all_of_them(name: str, cpu_library: Path) -> None:
    """The op makes as many tasks as the machine has cores; nobody else may come."""
    session = cpu_session(cpu_library, JOBS[name].model, 1)
    found: list[list[Array]] = []
    _at_once(lambda: found.extend(_run(session, JOBS[name]) for _ in range(3)))
    many = _run(cpu_session(cpu_library, JOBS[name].model, 8), JOBS[name])
    assert {each[0].tobytes() for each in found} == {many[0].tobytes()}


@pytest.mark.parametrize("shared", [True, False], ids=["one session", "a session each"])
@pytest.mark.parametrize("kind", ["linear", "MLP", "experts"])
def test_calls_at_the_same_time_do_not_touch_each_other(kind: str, shared: bool, cpu_library: Path) -> None:
    """Of different sizes, so that memory kept from one would be too small or full of another's numbers."""
    cases: Mapping[str, Any] = {
        "linear": [LinearCase(rows=rows, columns=300) for rows in (1, 33)],
        "MLP": [GatedMlpCase(rows=rows, hidden=96) for rows in (2, 37)],
        "experts": [MixtureCase(tokens=tokens, shared=Form(64)) for tokens in (3, 30)],
    }
    jobs = [case.job() for case in cases[kind]]
    first = cpu_session(cpu_library, jobs[0].model, 2)
    sessions = [first, first if shared else cpu_session(cpu_library, jobs[1].model, 2)]
    expected = [_run(cpu_session(cpu_library, job.model, 1), job)[0].tobytes() for job in jobs]

    def many_times(index: int) -> None:
        for _ in range(100):
            assert _run(sessions[index], jobs[index])[0].tobytes() == expected[index]

    _at_once(lambda: many_times(0), lambda: many_times(1))


def test_memory_of_a_larger_call_serves_a_smaller_one(cpu_library: Path) -> None:
    """Calls of a thread share memory, which is neither cleared nor given back."""
    cases = [MixtureCase(tokens=tokens, shared=Form(64)) for tokens in (50, 1, 7, 2, 64, 5)]
    session = cpu_session(cpu_library, cases[0].job().model, 2)
    other = LinearCase(rows=20)
    linear = cpu_session(cpu_library, other.job().model, 2)
    for case in cases:
        case.mixture(mlp).check(_run(session, case.job())[0])
        other.expected.check(_run(linear, other.job())[0])


def test_a_row_is_the_same_alone_and_among_others(cpu_library: Path) -> None:
    """Blocks of rows, unpacked codes and few rows take other ways to the same bits."""
    for bits in (4, 8):
        case = LinearCase(bits=bits, rows=37, columns=70, zero_points=True)
        session, values = cpu_session(cpu_library, case.job().model, 2), case.job().feeds["values"]
        together = session.run(None, {"values": values})[0]
        for count in (1, 2, 3, 4, 5, 8, 12, 13, 20):
            alone = session.run(None, {"values": values[-count:]})[0]
            np.testing.assert_array_equal(alone, together[-count:])
