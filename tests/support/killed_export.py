"""Kill an export at every step it takes on disk and say what each death leaves. Run as a script: FOLDER OLD|NEW RENAME.

A step is an audit event of the interpreter (open, mkdir, rename, remove...) on a path under FOLDER. For each step a
child process writes a bundle and kills itself (SIGKILL) there; the parent then looks at FOLDER/out as a user would,
lets the next writer clean up, and looks again. Prints one JSON list: [step, event, before clean-up, after, siblings].
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from qwenforge import atomic_folder
from qwenforge.bundle import Bundle
from qwenforge.errors import BundleError
from support.bundle_builder import write_bundle

EVENTS = ("open", "os.", "shutil.", "qwenforge.")


def state(out: Path) -> str:
    """``nothing``, ``old`` or ``new`` for a whole bundle, else the reason why it is refused."""
    if not out.exists():
        return "nothing"
    try:
        return Bundle.open(out, verify="full").model_path.read_text()
    except BundleError as error:
        return f"broken: {error}"


def child(folder: Path, fatal_step: int, report: int) -> None:
    """Write a bundle and die at step ``fatal_step``, after telling its event to the descriptor ``report``."""
    step = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal step
        if event.startswith(EVENTS) and any(str(folder) in str(argument) for argument in arguments):
            if step == fatal_step:
                os.write(report, event.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            step += 1

    sys.addaudithook(hook)
    write_bundle(folder / "out", model=b"new")


def main(folder: Path, with_old: bool, exchange: bool) -> None:
    """Kill at step 0, 1, ... until an export survives; print what each left."""
    if not exchange:
        atomic_folder._exchange = lambda first, second: False
    out, results = folder / "out", []
    prepared = write_bundle(folder.with_name("prepared"), model=b"old")
    for step in range(10_000):
        shutil.rmtree(folder)
        folder.mkdir()
        if with_old:
            shutil.copytree(prepared, out)
        reader, report = os.pipe()
        if (pid := os.fork()) == 0:
            child(folder, step, report)
            os._exit(0)
        os.close(report)
        status = os.waitpid(pid, 0)[1]
        event = os.read(reader, 100).decode()
        os.close(reader)
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(f"the export failed by itself at step {step}")
            break
        left = state(out)
        atomic_folder.clean_up_after_dead_writers(out)
        siblings = sorted(path.name for path in folder.iterdir() if path != out)
        results.append([step, event, left, state(out), siblings])
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "old", sys.argv[3] == "exchange")
