"""What TensorRT says while it works, kept for the error message."""

from __future__ import annotations

from typing import Any


def make_logger(module: Any) -> Any:
    """An ``ILogger`` of ``module`` that keeps errors and warnings in ``errors`` and ``warnings`` (lists of str)."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= module.ILogger.ERROR:
                self.errors.append(message)
            elif severity == module.ILogger.WARNING:
                self.warnings.append(message)

    return Logger()
