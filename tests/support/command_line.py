"""The program in a process of its own, as a user starts it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LONGEST_SECONDS = 240
"""No command of the tests takes a tenth of it; a hanging one is an error, not a hanging test run."""


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one sentence of a user error; asserts that there is nothing else."""
        assert self.code == 1
        assert self.out == ""
        assert self.err.startswith("qwenforge: error: ")
        assert self.err.count("\n") == 1 and self.err.endswith("\n")
        return self.err.removeprefix("qwenforge: error: ").strip()


def command(*arguments: str | Path) -> list[str]:
    """The command line of ``qwenforge ARGUMENTS``."""
    return [sys.executable, "-m", "qwenforge", *map(str, arguments)]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """``qwenforge ARGUMENTS``, running."""
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> Finished:
    """What ``process`` left, when it has ended."""
    out, err = process.communicate(timeout=LONGEST_SECONDS)
    return Finished(process.returncode, out, err)


def qwenforge(*arguments: str | Path, cwd: Path | None = None) -> Finished:
    """Run ``qwenforge ARGUMENTS`` to its end."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=LONGEST_SECONDS, cwd=cwd, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def interrupted_on_terminal(arguments: Sequence[str | Path], *, when: str) -> Finished:
    """Run it with a terminal as standard error and interrupt it when ``when`` is drawn there; stdout is a pipe."""
    terminal, child_side = os.openpty()  # the interrupt goes to the whole group, as from a keyboard
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=child_side,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        start_new_session=True,
    )
    os.close(child_side)
    drawn, interrupted = b"", False
    try:
        while piece := os.read(terminal, 65536):
            drawn += piece
            if when.encode() in drawn and not interrupted:
                os.killpg(process.pid, signal.SIGINT)
                interrupted = True
    except OSError as error:
        if error.errno != errno.EIO:  # how Linux says that the other side is closed
            raise
    finally:
        os.close(terminal)
    out, _ = process.communicate(timeout=LONGEST_SECONDS)
    return Finished(process.returncode, out, drawn.decode())
