"""What bounds a whole model on a GPU: bytes that a step reads over the measured copy bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from qwenforge.engine.planning.model_size import cache_bytes_per_token, count_parameters, experts_read
from qwenforge.engine.planning.recipes import RECIPES
from qwenforge.exporter.config import ModelConfig

_CACHE_ELEMENT_BYTES = 2.0
_BF16 = RECIPES[0]


@dataclass(frozen=True)
class DecodeFloor:
    """Of one decode step, in milliseconds.

    Attributes:
        weights_ms: reading the weights: all matrices, of the experts those that so many tokens are expected to go to.
        ms: reading the caches of all rows as well, of their length halfway through the new tokens.
    """

    weights_ms: float
    ms: float


def decode_floor(
    config: ModelConfig, *, batch: int, prompt_tokens: int, new_tokens: int, bandwidth: float
) -> DecodeFloor:
    """The floor in bf16 at ``bandwidth`` bytes a second."""
    weights = _BF16.bytes_read(count_parameters(config), experts_read(config, batch), batch * config.hidden_size)
    keys = batch * (prompt_tokens + new_tokens / 2)
    caches = keys * cache_bytes_per_token(config, _CACHE_ELEMENT_BYTES)
    return DecodeFloor(1e3 * weights / bandwidth, 1e3 * (weights + caches) / bandwidth)
