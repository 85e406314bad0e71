"""What a generation hands back: events while it runs, sequences when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwenforge.runtime.stopping import FinishReason


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one sequence.

    Attributes:
        sequence: which sequence, counted over prompts first, then over the n samples of each.
        token: the token's id.
        text: the text that became showable with it; pieces of a sequence add up to its text.
        finish_reason: why the sequence ended with this token, or None while it goes on.
    """

    sequence: int
    token: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class GeneratedSequence:
    """One finished answer.

    Attributes:
        prompt_tokens: the prompt.
        tokens: the new tokens, the end-of-sequence token included where one was chosen.
        text: their text without special tokens, cut before a stop string.
        finish_reason: ``stop``, ``stop_string``, ``length`` or ``capacity`` (see :data:`FinishReason`).
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class GenerationResult:
    """The sequences of a batch: the n samples of the first prompt, then those of the second, and so on."""

    sequences: tuple[GeneratedSequence, ...]

    @property
    def texts(self) -> list[str]:
        """Every sequence's text."""
        return [sequence.text for sequence in self.sequences]

    @property
    def tokens(self) -> list[list[int]]:
        """Every sequence's new tokens."""
        return [list(sequence.tokens) for sequence in self.sequences]

    def to_dict(self) -> dict[str, list[Any]]:
        """The object that ``qwenforge run --json`` prints: one list entry a sequence."""
        return {
            "prompt_tokens": [list(sequence.prompt_tokens) for sequence in self.sequences],
            "tokens": self.tokens,
            "text": self.texts,
            "finish_reason": [sequence.finish_reason for sequence in self.sequences],
        }
