"""qwenforge: a Qwen2 checkpoint in, a verified engine out.

    import qwenforge

    qwenforge.export("./Qwen2-0.5B", "./bundle", target="ort-cpu")
    model = qwenforge.load("./bundle")
    print(model.generate("Once upon a time", max_new_tokens=32).sequences[0].text)

This root package may be imported by every stage and imports none of them itself: the names below are resolved on
first use, so ``import qwenforge`` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenforge.engine.export import export_checkpoint as export
    from qwenforge.runtime import load

    __version__: str

__all__ = ["__version__", "export", "load"]

_LAZY = {
    "export": ("qwenforge.engine.export", "export_checkpoint"),
    "load": ("qwenforge.runtime", "load"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("qwenforge")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
