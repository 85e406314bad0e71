"""Running a bundle: ONNX Runtime session, key/value cache, sampling, tokenizer, generation.

``load`` and the types it hands out are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenforge.runtime.language_model import LanguageModel, load
    from qwenforge.runtime.results import GeneratedSequence, GenerationResult, TokenEvent

__all__ = ["GeneratedSequence", "GenerationResult", "LanguageModel", "TokenEvent", "load"]

_MODULES = {
    "GeneratedSequence": "results",
    "GenerationResult": "results",
    "LanguageModel": "language_model",
    "TokenEvent": "results",
    "load": "language_model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
