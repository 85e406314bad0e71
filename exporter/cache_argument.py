"""What transformers calls a model's key/value cache: ``cache`` since 5.24, ``past_key_values`` before."""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """The name of the argument of ``model.forward`` that takes the cache, and of the output that returns it."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
