"""A measured engine in a process of its own, asked for one run after the other over JSON lines."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from qwenforge.errors import UserError


class MeasuredProcess:
    """Starts a worker that speaks the protocol of :mod:`qwenforge.bench.worker`; ends it on leaving the context.

    Args:
        command: the worker's command line.
        subject: its name.
        arguments: what the worker needs to load the engine.

    Raises:
        UserError: the engine cannot be loaded.
    """

    def __init__(self, command: Sequence[str | Path], subject: str, arguments: dict[str, Any]) -> None:
        self.subject = subject
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self._ask({"subject": subject, "arguments": arguments})
        except BaseException:
            self.close()
            raise

    def run(self, *, prompt_tokens: int, new_tokens: int, seed: int) -> tuple[list[float], int]:
        """One run of one prompt.

        Returns:
            ``new_tokens + 1`` times in seconds (the start, then when each token was known), and the largest resident
            memory of the process so far in bytes.
        """
        request = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": 1, "seed": seed}
        answer = self._ask(request)
        return [float(time) for time in answer["times"]], self._peak_rss_bytes(int(answer["peak_rss_bytes"]))

    def _peak_rss_bytes(self, reported: int) -> int:
        """The kernel's own high-water mark; ``reported`` where there is none.

        What a worker finds by ``getrusage`` on Linux is at least its parent's peak, which it inherits.
        """
        status = Path(f"/proc/{self._process.pid}/status")
        if not status.is_file():
            return reported
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

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
