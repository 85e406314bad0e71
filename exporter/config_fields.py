"""Reading fields of ``config.json``: typed, with transformers' defaults, and refused by name when they do not fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from qwenforge.errors import CheckpointError, UnsupportedError

# fmt: off
BOOKKEEPING = frozenset(
    {
        "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "name_or_path", "use_cache",
        "initializer_range", "attention_dropout", "hidden_dropout", "classifier_dropout", "output_router_logits",
        "router_aux_loss_coef", "id2label", "label2id", "num_labels", "problem_type", "pad_token_id", "bos_token_id",
        "eos_token_id", "sep_token_id", "decoder_start_token_id", "output_hidden_states", "output_attentions",
        "return_dict", "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder", "attn_implementation",
        "experts_implementation", "finetuning_task", "prefix", "task_specific_params", "tokenizer_class", "torchscript",
        "use_bfloat16", "unsloth_fixed", "unsloth_version", "keys_to_ignore_at_inference", "max_length",
        "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "num_return_sequences", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "diversity_penalty", "bad_words_ids", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "return_dict_in_generate", "output_scores", "tf_legacy_loss", "cache_implementation",
    }
)
# fmt: on
"""Fields that say nothing about the numbers of a forward pass: bookkeeping, training, and generation settings that
older transformers kept here."""

_MAX_DEPTH = 32
"""Deepest nesting of a value; transformers writes 3."""

_EXPLANATIONS = {
    "compression_config": "compressed checkpoints are not supported; export the uncompressed checkpoint instead",
    "auto_map": "the checkpoint brings its own modeling code, which is not run; only transformers' own is supported",
    "dual_chunk_attention_config": "dual chunk attention is not supported; remove the field to run plain attention",
    "per_layer_config": "layers with different configurations are not supported",
    "use_mrope": "multimodal rotary embeddings are not supported; only text models are",
}


class Fields:
    """The fields of one JSON object; every one asked for is known, the others must be harmless."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Read from ``values``; ``where`` opens every message."""
        self.where = where
        self._values = values
        self._known: set[str] = set()

    @property
    def decisive(self) -> dict[str, Any]:
        """The fields that were asked for, but for the bookkeeping among them."""
        return {name: self._values[name] for name in self._values if name in self._known - BOOKKEEPING}

    def raw(self, name: str) -> Any:
        """The value as JSON gave it, None when absent."""
        self._known.add(name)
        return self._values.get(name)

    def has(self, name: str) -> bool:
        """Whether the field is there, even as null."""
        self._known.add(name)
        return name in self._values

    def integer(self, name: str, default: int | None, *, at_least: int = 1, at_most: int = (1 << 31) - 1) -> int:
        """An integer between the bounds; the default when absent, an error when that is None."""
        value = self._or_default(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
            raise self.error(name, f"must be an integer from {at_least} to {at_most}")
        return value

    def number(
        self, name: str, default: float | None, *, at_least: float = 0.0, at_most: float = sys.float_info.max
    ) -> float:
        """A positive number between the bounds; the default when absent, an error when that is None."""
        value = self._or_default(name, default)
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if not fits or not at_least <= value <= at_most:
            bounds = f" from {at_least:g} to {at_most:g}" if at_least > 0 else ""
            raise self.error(name, f"must be a positive number{bounds}")
        return float(value)

    def tokens(self, name: str) -> tuple[int, ...]:
        """The token numbers in a field that is absent, null, a number or a list of numbers.

        A number beyond the vocabulary is let through, as transformers does: no model can choose it.
        """
        value = self.raw(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_token(token) for token in ids):
            raise self.error(name, "must be a token number or a list of them")
        return tuple(ids)

    def token(self, name: str) -> int | None:
        """The token number in a field that may be absent or null."""
        value = self.raw(name)
        if value is None:
            return None
        if not _is_token(value):
            raise self.error(name, "must be a token number")
        return int(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false; the default when absent."""
        value = self._or_default(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def error(self, name: str, problem: str) -> CheckpointError:
        """A sentence about field ``name`` and its value."""
        shown = _short(self._values[name]) if name in self._values else "absent"
        return CheckpointError(f"{self.where}: {name!r} {problem}, not {shown}; correct the file")

    def refuse(self, name: str, what: str) -> UnsupportedError:
        """A sentence that names the field whose value is not supported."""
        return UnsupportedError(f"{self.where}: {name!r} = {_short(self._values.get(name))}: {what}")

    def finish(self, harmless: frozenset[str] = frozenset()) -> None:
        """Refuse by name whatever was neither asked for nor harmless nor switched off (null, false, empty)."""
        for name, value in self._values.items():
            if name in self._known or name in harmless or name.startswith("_"):
                continue
            if value is None or value is False or value in ({}, [], ""):
                continue
            why = _EXPLANATIONS.get(
                name, "this field is unknown and might change the results; remove it if it does not matter"
            )
            raise UnsupportedError(f"{self.where}: field {name!r} is not supported: {why}")

    def _or_default(self, name: str, default: Any) -> Any:
        self._known.add(name)
        if name not in self._values and default is None:
            raise CheckpointError(f"{self.where}: field {name!r} is missing; complete the file")
        return self._values.get(name, default)


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Refuse, naming the field, what JSON cannot carry on: NaN, infinity, half characters and very deep nesting.

    Raises:
        CheckpointError: a value of a field, or one inside it, is such.
    """
    pending = [(name, name, 0) for name in values] + [(name, value, 0) for name, value in values.items()]
    while pending:
        name, value, depth = pending.pop()
        problem = ""
        if isinstance(value, float) and not math.isfinite(value):
            problem = f"holds {value}, not a finite number"
        elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            problem = "holds half of a surrogate pair, which is no character"
        elif depth > _MAX_DEPTH:
            problem = f"is nested more than {_MAX_DEPTH} deep"
        if problem:
            raise CheckpointError(f"{where}: {_short(name)} {problem}; correct the file")
        if isinstance(value, Mapping):
            pending += [(name, inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list):
            pending += [(name, inner, depth + 1) for inner in value]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
