"""Writing a checkpoint folder: complete under another name first, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel

from tiny.chat import CHAT_TEMPLATE
from tiny.models import MAX_POSITIONS
from tiny.tokenizer import CHAT_END, END_OF_TEXT, token_id, tokenizer_config


def write_checkpoint(
    folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, report: dict[str, Any], shard_size: str
) -> None:
    """Write ``model`` in bfloat16, its tokenizer and its training report to the new folder ``folder``.

    Raises FileExistsError if ``folder`` exists; a run that is killed leaves nothing under that name.
    """
    if folder.exists():
        raise FileExistsError(folder)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        end_of_text = token_id(tokenizer, END_OF_TEXT)
        model.generation_config = GenerationConfig(
            bos_token_id=end_of_text,
            eos_token_id=[token_id(tokenizer, CHAT_END), end_of_text],
            pad_token_id=end_of_text,
            do_sample=False,
        )
        model.to(torch.bfloat16).save_pretrained(unfinished, max_shard_size=shard_size)
        tokenizer.save(str(unfinished / "tokenizer.json"), pretty=False)
        write_json(unfinished / "tokenizer_config.json", tokenizer_config(tokenizer, MAX_POSITIONS))
        (unfinished / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        write_json(unfinished / "training_report.json", report)
        unfinished.chmod(0o755)
        for path in unfinished.iterdir():
            path.chmod(0o644)
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` indented, with lists of integers on one line each."""
    indented = json.dumps(value, indent=2, ensure_ascii=False)
    text = re.sub(r"\[[\d,\s]+\]", lambda match: " ".join(match[0].split()), indented)
    path.write_text(text + "\n", encoding="utf-8")
