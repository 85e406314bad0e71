"""Rendering chat templates as Hugging Face's are written to be: one way for prompts at run time and calibration text.

The environment is sandboxed jinja2 with trimmed blocks, ``raise_exception``, ``strftime_now`` and a ``tojson`` that
leaves non-ASCII text alone.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

Message = Mapping[str, Any]
"""One chat message, such as ``{"role": "user", "content": "..."}``."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def render(
    template: str, messages: Sequence[Message], special_tokens: Mapping[str, str], *, add_generation_prompt: bool
) -> str:
    """The text of ``messages``; with ``add_generation_prompt`` it ends where the assistant's answer begins.

    Raises:
        jinja2.TemplateError: the template is damaged or rejects the messages.
        Exception: whatever the template, which is a program, runs into.
    """
    compiled = _environment().from_string(template)
    return str(compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **special_tokens))


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that templates may name, from the content of tokenizer_config.json."""
    found = {name: _token_text(tokenizer_config.get(name)) for name in _SPECIAL_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def _token_text(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _environment() -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def to_json(value: object, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
