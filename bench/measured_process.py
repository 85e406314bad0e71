"""A measured engine in a process of its own, asked for one run after the other over JSON lines."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from qwenforge.errors import UserError
from qwenforge.machine import high_water_mark


class MeasuredProcess:
    """Starts a worker that speaks the protocol of :mod:`qwenforge.bench.worker`; ends it on leaving the context.

    Args:
        command: the worker's command line.
        subject: its name.
        arguments: what the worker needs to load the engine.

    Attributes:
        description: of the loaded engine, in the worker's words.

    Raises:
        UserError: the engine cannot be loaded.
    """

    def __init__(self, command: Sequence[str | Path], subject: str, arguments: dict[str, Any]) -> None:
        self.subject = subject
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt from the keyboard is for us alone, who then kill the worker
        )
        try:
            self.description = str(self._ask({"subject": subject, "arguments": arguments})["description"])
        except BaseException:
            self.close()
            raise

    def run(self, *, prompt_tokens: int, new_tokens: int, seed: int, batch: int = 1) -> tuple[list[float], int]:
        """One run of ``batch`` prompts.

        Returns:
            ``new_tokens + 1`` times in seconds (the start, then when each token was known), and the largest resident
            memory of the process so far in bytes.
        """
        request = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "seed": seed}
        answer = self._ask(request)
        peak = high_water_mark(self._process.pid) or int(answer["peak_rss_bytes"])
        return [float(time) for time in answer["times"]], peak

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> MeasuredProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.subject} ended with exit code {self._process.wait()}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(str(answer["error"]))
        return answer
