"""How long each stage of an export takes, and what is told of it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, 0..1."""


class StageClock:
    """Times the stages and passes progress on."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._stage = ""
        self._since = time.perf_counter()
        self.start("read checkpoint")

    def start(self, stage: str) -> None:
        """The stage before is done, and ``stage`` begins."""
        now = time.perf_counter()
        if self._stage:
            self._seconds[self._stage] = now - self._since
        self._stage, self._since = stage, now
        self.tell(stage, 0.0)

    def tell(self, what: str, fraction: float) -> None:
        """Pass on what is being done and the fraction of it that is done."""
        if self._progress is not None:
            self._progress(what, fraction)

    def bytes_done(self, done: int, total: int, name: str) -> None:
        """Listen to the writing of weights."""
        self.tell(f"write weights: {name}", done / max(1, total))

    def steps_done(self, what: str, done: int, total: int) -> None:
        """Listen to the verification."""
        self.tell(f"verify: {what}", done / max(1, total))

    def finish(self) -> dict[str, float]:
        """Seconds by stage."""
        self.start("done")
        return self._seconds
