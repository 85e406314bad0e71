"""How far a calibration is, as numbers that a progress bar can show."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report.

    Attributes:
        piece, pieces: which part of the model is being calibrated, from 0, and how many there are.
        what: being done.
        done, total: tokens through pieces, of the whole calibration; what an earlier run did is done.
        tokens_per_second: of this run, through one piece; 0 until known.
        seconds_left: at that speed, searches included; None until known.
    """

    piece: int
    pieces: int
    what: str
    done: int
    total: int
    tokens_per_second: float
    seconds_left: float | None


Listener = Callable[[Progress], None]


class Meter:
    """Counts tokens and time for a listener.

    Args:
        listener: told of every step; None for nobody.
        pieces: of the model.
        tokens: of the calibration data.
    """

    def __init__(self, listener: Listener | None, pieces: int, tokens: int) -> None:
        self._listener = listener
        self._pieces = pieces
        self._tokens = tokens
        self._piece = 0
        self._skipped = 0
        self._inside = 0
        self._start = time.monotonic()
        self._running = 0.0
        self._ran = 0

    def begin(self, piece: int) -> None:
        """Piece ``piece`` is next."""
        self._piece, self._inside = piece, 0

    def skip(self) -> None:
        """The piece was done by an earlier run."""
        self._skipped += 1

    def ran(self, tokens: int, seconds: float) -> None:
        """The piece computed so many tokens."""
        self._inside += tokens
        self._ran += tokens
        self._running += seconds
        self.tell("running the model")

    def tell(self, what: str) -> None:
        """Report."""
        if self._listener is None:
            return
        total = self._pieces * self._tokens
        done = min(total, self._piece * self._tokens + self._inside)
        mine = done - self._skipped * self._tokens
        elapsed = time.monotonic() - self._start
        left = elapsed / mine * (total - done) if mine > 0 else None
        speed = self._ran / self._running if self._running > 0 else 0.0
        self._listener(Progress(self._piece, self._pieces, what, done, total, speed, left))
