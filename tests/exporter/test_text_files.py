"""Damaged tokenizer, template and generation files are refused when a checkpoint is opened, each in one sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from qwenforge.errors import CheckpointError
from qwenforge.exporter.checkpoint import Checkpoint
from support.checkpoints import make_checkpoint

DAMAGE = {
    "tokenizer.json": [
        ("{", "cannot be read as a tokenizer"),
        ("{}", "cannot be read as a tokenizer"),
        ("[]", "cannot be read as a tokenizer"),
        ('{"model": {"type": "BPE"}}', "cannot be read as a tokenizer"),
    ],
    "tokenizer_config.json": [
        ("nope", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"chat_template": "{% for m in %}"}', "holds no valid chat template"),
    ],
    "chat_template.jinja": [("{{ messages[0] ", "holds no valid chat template")],
    "generation_config.json": [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"eos_token_id": "x"}', "'eos_token_id' must be a token number or a list of them, not 'x'"),
        ('{"eos_token_id": [1, -1]}', "'eos_token_id' must be a token number"),
        ('{"pad_token_id": true}', "'pad_token_id' must be a token number"),
        ('{"temperature": NaN}', "'temperature' holds nan, not a finite number"),
        ('{"top_p": Infinity}', "'top_p' holds inf, not a finite number"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, content, message) for name, cases in DAMAGE.items() for content, message in cases],
)
def test_damaged_file_is_refused_by_name(folder: Path, name: str, content: str, message: str) -> None:
    path = folder / name
    before = path.read_text() if path.exists() else None
    path.write_text(content)
    try:
        with pytest.raises(CheckpointError) as refusal:
            Checkpoint.open(folder)
    finally:
        path.unlink() if before is None else path.write_text(before)
    assert str(path) in str(refusal.value) and message in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("template", ["{% generation %}x{% endgeneration %}", "{% break %}{{ messages }}"])
def test_tags_of_transformers_are_no_damage(folder: Path, template: str) -> None:
    path = folder / "chat_template.jinja"
    before = path.read_text()
    path.write_text(template)
    try:
        assert "chat_template.jinja" in Checkpoint.open(folder).tokenizer_files
    finally:
        path.write_text(before)


def test_metadata_other_than_text_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen2", num_hidden_layers=1, tokenizer=False) / "model.safetensors"
    stored = path.read_bytes()
    (length,) = struct.unpack("<Q", stored[:8])
    header = json.loads(stored[8 : 8 + length]) | {"__metadata__": {"format": 5}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + stored[8 + length :])
    with pytest.raises(CheckpointError, match="__metadata__ is not a table of texts"):
        Checkpoint.open(tmp_path)
