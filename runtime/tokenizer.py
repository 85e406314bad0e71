"""Text to tokens and back: ``tokenizer.json``, the chat template, and detokenisation piece by piece.

How a template is rendered is in :mod:`qwenforge.chat_template`, which calibration uses too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwenforge.chat_template import Message, render, special_tokens
from qwenforge.errors import BundleError, UserError

REPLACEMENT = "\ufffd"


class Tokenizer:
    """A bundle's tokenizer and chat template.

    Args:
        path: the tokenizer.json.
        config: the content of tokenizer_config.json.
        chat_template: the jinja template; None takes ``config["chat_template"]`` if that is a string.

    Raises:
        BundleError: the file cannot be read; raised by the methods too where only its use shows the damage.
    """

    def __init__(
        self, path: str | Path, config: Mapping[str, Any] | None = None, chat_template: str | None = None
    ) -> None:
        import tokenizers

        self.path = Path(path)
        with self._named_failures("cannot read the tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_str(self.path.read_text(encoding="utf-8"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = dict(config or {})
        in_config = self._config.get("chat_template")
        self._template = chat_template or (in_config if isinstance(in_config, str) else None)
        self.special_tokens = special_tokens(self._config)
        self.joins_bytes = isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)
        """Whether text is the tokens' bytes joined, as Qwen's is: no token's depends on those before it."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of ``text``; special tokens written in it are recognized.

        Raises:
            UserError: the text holds lone surrogates (a command line argument that was not UTF-8).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode at character {error.start}: give UTF-8") from error
        with self._named_failures("the tokenizer cannot encode the text"):
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        try:
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
        except BaseException:  # only then: entering the block for every token would show in the time of a step
            with self._named_failures("the tokenizer cannot decode the tokens"):
                raise

    def token_id(self, text: str) -> int | None:
        """The id of the token spelled ``text``, or None."""
        found = self._tokenizer.token_to_id(text)
        return None if found is None else int(found)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The prompt text for ``messages``, ready for the assistant's answer.

        Raises:
            UserError: there is no chat template, it is damaged, or it rejects the messages.
        """
        import jinja2

        if self._template is None:
            raise UserError(f"{self.path.parent}: the bundle has no chat template; give the text with --prompt instead")
        try:
            return render(self._template, messages, self.special_tokens, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise UserError(
                f"{self.path.parent}: the chat template rejects the messages: {_one_line(error)}; change the messages "
                "or give the text with --prompt instead"
            ) from error
        # A template is a program: it can divide by zero, recurse without end or ask for more memory than there is.
        except Exception as error:
            raise UserError(
                f"{self.path.parent}: the chat template fails ({_one_line(error)}); give the text with --prompt instead"
            ) from error

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of :meth:`render_chat`, whose template writes every special token itself."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    @contextmanager
    def _named_failures(self, what: str) -> Iterator[None]:
        """Turn what tokenizers raises on a damaged file, bare Exception and Rust's panics, into BundleError."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            raise BundleError(f"{self.path}: {what} ({_one_line(error)}); export the bundle again") from error


class IncrementalDecoder:
    """Detokenises a growing sequence into pieces that are never cut inside a character.

    A piece is the difference between the text of a window of recent tokens with and without the new ones; the
    window's first part gives the decoder the context it needs (a leading space, for instance), if it needs any. While
    the window's text ends in U+FFFD a character may be incomplete, and the piece waits for the next token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Take one token; return the text that became complete, often empty inside a character."""
        self._pending.append(token)
        return self._release(final=False)

    def flush(self) -> str:
        """The text of an incomplete character at the end, as U+FFFD."""
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        if not self._pending:
            return ""
        before = self._tokenizer.decode(self._context) if self._context else ""
        after = self._tokenizer.decode([*self._context, *self._pending])
        if len(after) <= len(before) or (after.endswith(REPLACEMENT) and not final):
            if final:
                self._context, self._pending = [*self._context, *self._pending], []
            return ""
        piece = after[len(before) :]
        self._context, self._pending = [] if self._tokenizer.joins_bytes else self._pending, []
        return piece


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
