"""The measured process: its protocol line by line, its errors, its memory; and the subject that runs a bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwenforge.bench.subjects import QwenforgeSubject
from qwenforge.bench.worker import peak_rss_bytes
from qwenforge.errors import UserError

STAND_INS = """
import sys
from qwenforge.bench import subjects, worker
from qwenforge.errors import UserError

class Subject:
    description, vocab_size = "a stand-in", 40

    def __init__(self, problem=None, **arguments):
        if problem == "refused":
            raise UserError("there is no such model; give another.")
        if problem is not None:
            raise ModuleNotFoundError(f"No module named {problem!r}", name=problem)
        print("a library talks", {name: type(value).__name__ for name, value in arguments.items()})

    def steps(self, prompts, new_tokens):
        print("prompts", prompts)
        if len(prompts) > 3:
            raise UserError("four prompts are too many; give three.")
        return [float(step) for step in range(new_tokens + 1)]

subjects.SUBJECTS["stand-in"] = Subject
sys.exit(worker.main())
"""


def ask(*requests: dict[str, Any], program: list[str] | None = None) -> tuple[int, list[dict[str, Any]], str]:
    """Run a worker on these lines: its exit code, its answers and its standard error."""
    done = subprocess.run(
        [sys.executable, *(program or ["-c", STAND_INS])],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def setup(**arguments: Any) -> dict[str, Any]:
    return {"subject": "stand-in", "arguments": arguments}


def run(seed: int = 0, batch: int = 2) -> dict[str, Any]:
    return {"prompt_tokens": 5, "new_tokens": 3, "batch": batch, "seed": seed}


def test_worker_answers_every_line_and_ends_with_its_input() -> None:
    code, answers, _ = ask(setup(), run(), run())
    assert code == 0
    assert answers[0] == {"description": "a stand-in", "vocab_size": 40}
    assert [answer["times"] for answer in answers[1:]] == [[0.0, 1.0, 2.0, 3.0]] * 2
    assert all(answer["peak_rss_bytes"] > 5e6 for answer in answers[1:])


def test_prompts_follow_the_seed_and_what_a_library_prints_goes_to_stderr() -> None:
    _, answers, errors = ask(setup(bundle="here", threads=2), run(1), run(2), run(1))
    assert len(answers) == 4
    first, *prompts = errors.splitlines()
    assert first.startswith("a library talks") and "'threads': 'int'" in first
    assert "'bundle': 'PosixPath'" in first or "'bundle': 'WindowsPath'" in first
    assert prompts[0] == prompts[2] != prompts[1]
    rows = json.loads(prompts[0].removeprefix("prompts "))
    assert [len(row) for row in rows] == [5, 5]
    assert all(0 <= token < 40 for row in rows for token in row)


def test_refusals_are_answered_in_their_own_words() -> None:
    code, answers, errors = ask(setup(problem="refused"))
    assert (code, answers, errors) == (1, [{"error": "there is no such model; give another."}], "")
    code, answers, errors = ask(setup(), run(batch=4), run())
    assert code == 1
    assert answers[1:] == [{"error": "four prompts are too many; give three."}]
    assert "Traceback" not in errors


def test_missing_library_is_named_and_a_bug_keeps_its_traceback() -> None:
    code, answers, errors = ask(setup(problem="torch"))
    assert (code, errors) == (1, "")
    assert answers == [{"error": "measuring stand-in needs torch, which is not installed: install it here."}]
    code, answers, errors = ask(setup(problem="qwenforge.gone"))
    assert (code, answers) == (1, [])
    assert "ModuleNotFoundError: No module named 'qwenforge.gone'" in errors


def test_real_worker_measures_a_bundle(bundle: Path) -> None:
    request = {"subject": "qwenforge", "arguments": {"bundle": str(bundle), "threads": 1, "max_batch": 2}}
    code, answers, errors = ask(request, run(), program=["-m", "qwenforge.bench.worker"])
    assert (code, errors) == (0, "")
    assert answers[0] == {"description": "qwenforge", "vocab_size": 320}
    times = answers[1]["times"]
    assert len(times) == 4 and times == sorted(times)


def test_peak_memory_is_the_process_s_own_and_keeps_its_maximum() -> None:
    script = (
        "from qwenforge.bench.worker import peak_rss_bytes\n"
        "print(peak_rss_bytes())\nballast = b'x' * 80_000_000\nprint(peak_rss_bytes())\n"
        "del ballast\nprint(peak_rss_bytes())"
    )
    ballast = b"x" * 300_000_000  # of this process: not to be seen in the other one's figure
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, with_ballast, after = (int(line) for line in done.stdout.split())
    assert peak_rss_bytes() > len(ballast) > before
    assert with_ballast - before > 70_000_000
    assert after - before > 70_000_000


@pytest.fixture(scope="module")
def subject(bundle: Path) -> QwenforgeSubject:
    return QwenforgeSubject(bundle, threads=1, max_batch=3)


@pytest.mark.parametrize("batch", [1, 3])
def test_subject_times_the_start_and_every_step(subject: QwenforgeSubject, batch: int) -> None:
    times = subject.steps([[5, 6, 7, 8]] * batch, 7)
    assert len(times) == 8 and times == sorted(times)


def test_subject_goes_on_after_an_end_token(subject: QwenforgeSubject) -> None:
    """Otherwise a run would be shorter than the others by luck."""
    subject._model.end_tokens = frozenset(range(subject.vocab_size))
    assert len(subject.steps([[5, 6, 7, 8]], 7)) == 8


def test_batch_that_would_be_generated_in_turns_is_refused(subject: QwenforgeSubject) -> None:
    with pytest.raises(UserError, match="4 prompts at once are more than the 3 loaded for"):
        subject.steps([[1, 2]] * 4, 2)
