"""When a sequence ends, and stop strings found in a stream of text without ever showing part of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qwenforge.errors import UserError

DEFAULT_MAX_NEW_TOKENS = 256
"""New tokens of a sequence, unless the caller says otherwise."""

FinishReason = Literal["stop", "stop_string", "length", "capacity"]
"""``stop``: an end-of-sequence token; ``stop_string``: a stop string; ``length``: max_new_tokens; ``capacity``: the
key/value cache is full (prompt and answer reach the bundle's max_length)."""


class StopStrings:
    """Releases text that cannot be the beginning of a stop string any more.

    Args:
        stops: the stop strings; the text ends before the first to be complete.

    Raises:
        UserError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UserError("a stop string is empty: it would stop before the first token; leave it out")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text, or None."""

    def push(self, text: str) -> str:
        """Take more text; return what can be shown. After a stop string was found, always the empty string."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        # The one completed first ends the text, so that the result does not depend on how the text was cut.
        hits = [(self._held.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in self._held]
        if hits:
            end, _, self.found = min(hits)
            shown, self._held = self._held[: end - len(self.found)], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """The text still held back, at the end of the stream."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
