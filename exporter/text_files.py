"""A checkpoint's files that have to do with text: tokenizer, chat template, generation settings.

They are only copied into a bundle, but a damaged one is refused before minutes go into an export that cannot speak.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenforge.errors import CheckpointError
from qwenforge.exporter.checkpoint_files import inside, read_json_object
from qwenforge.exporter.config_fields import Fields, check_values

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
_JSON_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
TOKENIZER_FILES = (TOKENIZER, *_JSON_OBJECTS, CHAT_TEMPLATE, "vocab.json", "merges.txt")
GENERATION_CONFIG = "generation_config.json"


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files that ``folder`` has, by name; the paths are real ones.

    Raises:
        CheckpointError: one is damaged or lies outside the folder.
    """
    files = {
        name: inside(folder, name, named_by=str(folder))
        for name in TOKENIZER_FILES
        if (folder / name).exists() or (folder / name).is_symlink()
    }
    for name in files.keys() & set(_JSON_OBJECTS):
        template = read_json_object(files[name]).get("chat_template")
        if isinstance(template, str):
            _check_template(folder / name, template)
    if TOKENIZER in files:
        _check_tokenizer(folder / TOKENIZER, files[TOKENIZER])
    if CHAT_TEMPLATE in files:
        try:
            template = files[CHAT_TEMPLATE].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder / CHAT_TEMPLATE} is not UTF-8 text ({error}): download it again") from error
        _check_template(folder / CHAT_TEMPLATE, template)
    return files


def read_generation_config(folder: Path) -> Mapping[str, Any]:
    """``generation_config.json``, empty when there is none.

    Raises:
        CheckpointError: it is damaged, holds NaN or infinity, or a token number that is none.
    """
    path = folder / GENERATION_CONFIG
    if not path.exists() and not path.is_symlink():
        return {}
    config = read_json_object(inside(folder, GENERATION_CONFIG, named_by=str(folder)))
    check_values(config, str(path))
    fields = Fields(config, str(path))
    fields.tokens("eos_token_id")
    for name in ("bos_token_id", "pad_token_id"):
        fields.token(name)
    return config


def _check_tokenizer(shown: Path, path: Path) -> None:
    import tokenizers

    try:
        text = path.read_text(encoding="utf-8")
        if not isinstance(json.loads(text), dict):
            raise ValueError("no JSON object")
        tokenizers.Tokenizer.from_str(text).encode("x")  # some damage shows only in use
    except (KeyboardInterrupt, SystemExit):
        raise
    # tokenizers raises bare Exception for what it cannot parse, and Rust's panics are no Exception; the cause stays.
    except BaseException as error:
        raise CheckpointError(f"{shown} cannot be read as a tokenizer ({error}): download it again") from error


def _check_template(shown: Path, template: str) -> None:
    import jinja2

    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateError as error:
        if f"{error.message}".startswith("Encountered unknown tag 'generation'"):
            return  # transformers has tags of its own; whether the runtime can do without shows when it is used
        raise CheckpointError(f"{shown} holds no valid chat template ({error.message}): download it again") from error
    except RecursionError as error:
        raise CheckpointError(f"{shown} is nested too deeply for a chat template: download it again") from error
