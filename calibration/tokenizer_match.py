"""Whether a tokenizer belongs to a model, as far as numbers tell without running it.

Three signs: tokens that the model does not have, rows of its vocabulary that no token of the tokenizer uses, and
special tokens that the tokenizer lacks or that have other numbers than the model's. What the model makes of the
tokens is the fourth (:mod:`qwenforge.calibration.fluency`), and finds a vocabulary that was permuted.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from qwenforge.chat_template import special_tokens
from qwenforge.exporter.text_files import TOKENIZER

_SMALLEST_PART = 0.9
"""Of the model's vocabulary that its tokenizer uses; published ones pad theirs by less than one part in two hundred."""


def tokenizer_doubts(files: Mapping[str, Path], vocab_size: int, end_tokens: Collection[int]) -> list[str]:
    """Signs that the tokenizer is another model's, a sentence each.

    Args:
        files: the tokenizer's, by name; without ``tokenizer.json`` nothing can be said.
        vocab_size: V of the model.
        end_tokens: that the model's configs name as ends of a text.
    """
    if TOKENIZER not in files:
        return []
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(files[TOKENIZER].read_text(encoding="utf-8"))
    doubts = []
    size = tokenizer.get_vocab_size()
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        doubts.append(
            f"the tokenizer has {size} tokens up to number {largest}, the model {vocab_size}: it is another model's "
            "tokenizer, or the checkpoint's vocabulary was cut"
        )
    elif size < _SMALLEST_PART * vocab_size:
        doubts.append(
            f"the tokenizer has {size} tokens, the model {vocab_size}: check that the tokenizer is this model's"
        )
    path = files.get("tokenizer_config.json")
    special = special_tokens(json.loads(path.read_text(encoding="utf-8"))) if path is not None else {}
    for role, token in special.items():
        if tokenizer.token_to_id(token) is None:
            doubts.append(
                f"the tokenizer does not know {token!r}, which tokenizer_config.json names as {role}: check that both "
                "are this model's"
            )
    end = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    if end is not None and end_tokens and end not in end_tokens:
        doubts.append(
            f"the tokenizer's {special['eos_token']!r} is token {end}, and the model's texts end with "
            f"{' or '.join(map(str, sorted(end_tokens)))}: check that the tokenizer is this model's"
        )
    return doubts
