"""TensorRT's progress as one fraction, and the way to stop a build."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, 0..1."""


def make_monitor(module: Any, progress: Progress, cancelled: threading.Event) -> Any:
    """An ``IProgressMonitor`` of ``module`` that reports to ``progress`` and stops the build once ``cancelled`` is set.

    TensorRT nests phases: a phase without a parent is the whole, and each of its phases a share of its parent's step.
    """

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps done, steps

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (parent_phase or None, 0, max(num_steps, 1))
            self._report(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._phases:
                    parent, _, steps = self._phases[phase_name]
                    self._phases[phase_name] = (parent, min(step + 1, steps), steps)
            self._report(phase_name)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _report(self, phase: str) -> None:
            with self._lock:
                share, name = 0.0, phase
                while name in self._phases:
                    parent, done, steps = self._phases[name]
                    share = min((done + share) / steps, 1.0)
                    name = parent or ""
            progress(phase, share)

    return Monitor()
