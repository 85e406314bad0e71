"""Calibration data: documents made into rows of tokens of one length, chosen by a seed.

Documents are tokenized in order and joined, an end-of-text token between two; the stream is cut into rows, and a seed
chooses among them. No more than eight times the tokens wanted are read, so that a dataset of any size will do.

Text that cannot calibrate is refused here: too little of it, or tokens that the model does not have. Text that the
model cannot predict shows when the model runs (:mod:`qwenforge.calibration.fluency`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.calibration.documents import Document, read_documents
from qwenforge.chat_template import render, special_tokens
from qwenforge.errors import CheckpointError, UserError
from qwenforge.exporter.text_files import CHAT_TEMPLATE, TOKENIZER

Tokens = npt.NDArray[np.int64]

ROWS = 64
ROW_LENGTH = 512
MIN_TOKENS = 256
"""Fewer tokens than this say next to nothing about the ranges of activations."""

_READ_FACTOR = 8
_UNKNOWN_REFUSED = 0.05
_UNKNOWN_REPORTED = 0.001
_TOKENS_PER_BYTE = 0.7
_SMALL_VOCABULARY = 1000


@dataclass(frozen=True)
class CalibrationData:
    """Rows of tokens to run the model on.

    Attributes:
        tokens: [R, L] int64; every token counts, there is no padding.
        source: where they came from, for reports.
        warnings: what is doubtful about them, a sentence each.
    """

    tokens: Tokens
    source: str
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape[1] < 2:
            raise ValueError(f"calibration tokens have shape {list(self.tokens.shape)}, not [rows, length]")

    def fingerprint(self) -> str:
        """A hash of the tokens, in hexadecimal."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        digest.update(np.ascontiguousarray(self.tokens, "<i8").tobytes())
        return digest.hexdigest()


def load_calibration_data(
    path: Path | None,
    tokenizer_files: Mapping[str, Path],
    *,
    vocab_size: int,
    rows: int = ROWS,
    row_length: int = ROW_LENGTH,
    seed: int = 0,
) -> CalibrationData:
    """Rows of tokens of ``path``, or of the built-in sample when it is None.

    Args:
        path: see :func:`qwenforge.calibration.documents.read_documents`.
        tokenizer_files: the model's, by name, as ``Checkpoint.tokenizer_files`` has them.
        vocab_size: of the model.
        rows: how many at most; there are fewer when the text ends, which is reported.
        row_length: tokens of a row; a text that is shorter gives one row of its own length.
        seed: of the choice of rows.

    Raises:
        UserError: the data cannot be read, hold fewer than 256 tokens, or do not fit the model's vocabulary.
    """
    text = _Text(tokenizer_files)
    stream, size, documents = _tokenized(path, text, limit=_READ_FACTOR * rows * row_length)
    per_byte = len(stream) / max(1, size)
    stream = stream[: _READ_FACTOR * rows * row_length]
    source = str(path) if path is not None else "the built-in sample"
    if len(stream) < MIN_TOKENS:
        raise UserError(
            f"the calibration data {source} have {len(stream)} tokens, too few to calibrate with: give at least "
            f"{MIN_TOKENS}, better {rows * row_length}"
        )
    _refuse_unknown_tokens(stream, vocab_size, source)
    warnings = [*text.doubts(stream, per_byte, source)]
    length = min(row_length, len(stream))
    there = len(stream) // length
    if there < rows:
        warnings.append(
            f"the calibration data {source} fill {there} rows of {length} tokens, not {rows} of {row_length}"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(there)[:rows])
    tokens = stream[: there * length].reshape(there, length)[chosen]
    return CalibrationData(np.ascontiguousarray(tokens), f"{source} ({documents} documents)", tuple(warnings))


def _tokenized(path: Path | None, text: _Text, *, limit: int) -> tuple[Tokens, int, int]:
    """The tokens of documents until there are ``limit``, and of how many bytes and documents they are."""
    parts: list[Tokens] = []
    size = count = documents = 0
    for encoded, length in _encoded(path, text):
        parts.append(np.asarray(encoded, np.int64))
        size, count, documents = size + length, count + len(encoded), documents + 1
        if count >= limit:
            break
    stream = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return stream, size, documents


def _encoded(path: Path | None, text: _Text) -> Iterator[tuple[list[int], int]]:
    for where, document in read_documents(path):
        written = text.written(document, where, plain=path is None)
        yield [*text.encode(written, where), *text.separator], len(written.encode("utf-8", "surrogatepass"))


def _refuse_unknown_tokens(stream: Tokens, vocab_size: int, source: str) -> None:
    largest = int(stream.max())
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer makes token {largest} of {source}, but the model has {vocab_size} tokens: it is another "
            "model's tokenizer"
        )


class _Text:
    """The model's tokenizer and chat template."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        import tokenizers

        if TOKENIZER not in files:
            raise CheckpointError("the checkpoint has no tokenizer.json, which calibration text needs: add the file")
        self._path = files[TOKENIZER]
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises no kind of its own
            raise CheckpointError(f"{self._path} cannot be read as a tokenizer ({error}): download it again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = _read_json(files.get("tokenizer_config.json"))
        self._special = special_tokens(config)
        self._template = _chat_template(files, config)
        end = self._tokenizer.token_to_id(self._special["eos_token"]) if "eos_token" in self._special else None
        self.separator = () if end is None else (int(end),)

    def written(self, document: Document, where: str, *, plain: bool) -> str:
        """The document as text; ``plain`` conversations will do for a model without a chat template."""
        if isinstance(document, str):
            return document
        if self._template is None and plain:
            return "\n\n".join(str(message["content"]) for message in document)
        if self._template is None:
            raise UserError(f"{where} is a conversation, and the model has no chat template: give 'text' instead")
        try:
            return render(self._template, document, self._special, add_generation_prompt=False)
        except Exception as error:  # a template is a program and may fail in any way
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{where}: the chat template rejects the messages ({reason}): correct them") from error

    def encode(self, text: str, where: str) -> list[int]:
        """The tokens of ``text``; special tokens written in it are recognized, none are added."""
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # lone surrogates, or a tokenizer that is damaged
            raise UserError(f"{where}: the tokenizer cannot encode the text ({error})") from error

    def doubts(self, stream: Tokens, per_byte: float, source: str) -> Iterator[str]:
        """Signs that this tokenizer was not made for such text.

        Raises:
            UserError: one token in twenty is the unknown token.
        """
        unknown = json.loads(self._tokenizer.to_str())["model"].get("unk_token")
        token = self._tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None
        share = float(np.mean(stream == token)) if token is not None else 0.0
        if share > _UNKNOWN_REFUSED:
            raise UserError(
                f"{share:.0%} of the tokens of {source} are unknown to the tokenizer {self._path}: it is another "
                "model's, or the text is in a language it does not know"
            )
        if share > _UNKNOWN_REPORTED:
            yield f"{share:.1%} of the tokens of {source} are unknown to the tokenizer"
        if self._tokenizer.get_vocab_size() > _SMALL_VOCABULARY and per_byte > _TOKENS_PER_BYTE:
            yield (
                f"the tokenizer makes {per_byte:.2f} tokens of a byte of {source}: it may be another "
                "model's, or the text in a language it does not know"
            )


def _read_json(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _chat_template(files: Mapping[str, Path], config: Mapping[str, Any]) -> str | None:
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].read_text(encoding="utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None
