"""An interrupt ends the program with 130 even where a library drops it, wraps it, or runs text when it strikes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qwenforge.cli import interrupts

PROGRAM = """
import os, signal, sys, weakref
from types import SimpleNamespace
from qwenforge.cli import main as program
from qwenforge.cli.interrupts import raise_if_interrupted

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)

class Thing:
    pass

def dropped():
    thing = Thing()
    reference = weakref.ref(thing, interrupt)
    del thing
    raise_if_interrupted()

def wrapped():
    try:
        interrupt()
    except KeyboardInterrupt:
        raise ValueError("conversion failed") from None

def executed():
    exec("interrupt()", {"interrupt": interrupt})

def plain():
    interrupt()

def work(_):
    globals()[sys.argv[1]]()
    print("went on")
    return 0

program.load_command = lambda verb: SimpleNamespace(
    name=verb, description="", example="", add_arguments=lambda parser: None, run=work
)
sys.exit(program.main(["doctor"]))
"""


@pytest.mark.parametrize("how", ["plain", "dropped", "wrapped", "executed"])
def test_interrupt_ends_the_program_however_it_strikes(how: str, tmp_path: Path) -> None:
    # As a module, like ``python -m qwenforge``: only there CPython may prefer the signal to the exit code.
    (tmp_path / "interrupted.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "interrupted", how]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "qwenforge: interrupted\n")


def test_error_without_an_interrupt_is_left_alone() -> None:
    with pytest.raises(ValueError, match="a bug"), interrupts.remembered():
        raise ValueError("a bug")
    interrupts.raise_if_interrupted()


def test_block_ends_with_the_usual_handler_and_forgets_earlier_interrupts() -> None:
    report = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interrupts.remembered():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.unraisablehook is report
    with interrupts.remembered():
        interrupts.raise_if_interrupted()


def test_handler_of_somebody_else_stays() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.remembered():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_run_the_program_too() -> None:
    seen: list[str] = []

    def work() -> None:
        with interrupts.remembered():
            seen.append("ran")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["ran"]
