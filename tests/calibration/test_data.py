"""Calibration data: every form is read, and what cannot calibrate is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenforge.calibration.data import load_calibration_data
from qwenforge.calibration.documents import read_documents
from qwenforge.errors import UserError
from qwenforge.exporter.checkpoint import Checkpoint
from support.trained_models import CHECKPOINTS

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 60
CHAT = [{"role": "user", "content": "What is a fox?"}, {"role": "assistant", "content": "An animal. " * 200}]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(CHECKPOINTS / "tiny-qwen2")


def _load(checkpoint: Checkpoint, path: Path | None, **arguments: Any) -> Any:
    return load_calibration_data(
        path, checkpoint.tokenizer_files, **{"vocab_size": 2048, "rows": 4, "row_length": 64} | arguments
    )


def test_text_file_is_tokenized_as_the_tokenizers_library_does(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import tokenizers

    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    data = _load(checkpoint, path, rows=1000)
    expected = tokenizers.Tokenizer.from_file(str(checkpoint.tokenizer_files["tokenizer.json"])).encode(TEXT).ids
    assert data.tokens.dtype == np.int64
    assert data.tokens.reshape(-1).tolist() == expected[: data.tokens.size]
    assert any("not 1000" in warning for warning in data.warnings)


def test_conversations_are_written_by_the_chat_template(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n\n" + json.dumps({"text": TEXT}) + "\n")
    data = _load(checkpoint, path, rows=1000, row_length=300)
    reference = AutoTokenizer.from_pretrained(checkpoint.folder)
    written = reference.apply_chat_template(CHAT, tokenize=False)
    expected = reference(written, add_special_tokens=False)["input_ids"]
    assert data.tokens[0].tolist() == expected[:300]


@pytest.mark.parametrize("form", ["save_to_disk", "splits", "parquet", "feather"])
def test_datasets_on_disk_are_read(form: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="datasets are read with pyarrow")
    feather, parquet = (pytest.importorskip(f"pyarrow.{name}") for name in ("feather", "parquet"))
    table = pyarrow.table({"text": [TEXT, TEXT + "end"], "other": [1, 2]})
    folder = tmp_path / "data"
    inside = folder / "train" if form == "splits" else folder
    inside.mkdir(parents=True)
    if form == "parquet":
        parquet.write_table(table, folder / "part-0.parquet")
    elif form == "feather":
        feather.write_feather(table, folder / "part.arrow")
    else:  # what datasets.save_to_disk writes: a stream of record batches beside its state
        with pyarrow.ipc.new_stream(inside / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
        (inside / "state.json").write_text("{}")
    if form == "splits":
        (folder / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert [document for _, document in read_documents(folder)] == [TEXT, TEXT + "end"]
    assert _load(checkpoint, folder).tokens.shape == (4, 64)


def test_choice_of_rows_is_by_seed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first, again, other = (_load(checkpoint, None, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_built_in_sample_fills_the_default_rows_and_is_not_the_held_out_text(checkpoint: Checkpoint) -> None:
    data = load_calibration_data(None, checkpoint.tokenizer_files, vocab_size=2048)
    assert data.tokens.shape == (64, 512) and not data.warnings
    held_out = (CHECKPOINTS / "heldout.txt").read_text()
    paragraphs = {" ".join(part.split()) for part in held_out.split("\n\n") if len(part) > 100}
    for _, document in read_documents(None):
        written = document if isinstance(document, str) else "\n\n".join(str(each["content"]) for each in document)
        assert paragraphs.isdisjoint(" ".join(part.split()) for part in written.split("\n\n"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("short.txt", "one two three", r"short\.txt have 5 tokens.*at least 256"),
        ("empty.txt", "", r"empty\.txt is empty"),
        ("bad.jsonl", '{"text": "fine"}\n{"text": \n', r"bad\.jsonl:2 is not JSON"),
        ("other.jsonl", '{"prompt": "fine"}\n', r"other\.jsonl:1 has neither a 'text' nor 'messages'"),
        ("chat.jsonl", '{"messages": [{"role": "user"}]}\n', r"chat\.jsonl:1 has neither"),
        ("latin.txt", b"caf\xe9 " * 500, r"latin\.txt is not UTF-8 text \(byte 3\)"),
        ("damaged.parquet", b"PAR1 nothing", r"damaged\.parquet cannot be read"),
    ],
)
def test_unusable_data_are_refused(
    name: str, content: str | bytes, said: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow")
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=said):
        _load(checkpoint, path)


def test_missing_file_and_folder_without_data_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        _load(checkpoint, tmp_path / "nothing.txt")
    with pytest.raises(UserError, match=r"no \.arrow or \.parquet"):
        _load(checkpoint, tmp_path)


def test_datasets_without_pyarrow_say_what_to_install(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    (tmp_path / "part.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        _load(checkpoint, tmp_path)


def test_tokenizer_of_a_larger_vocabulary_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="but the model has 500 tokens: it is another model's tokenizer"):
        _load(checkpoint, None, vocab_size=500)


def test_tokenizer_that_does_not_know_the_text_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "the": 1, "of": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    with pytest.raises(UserError, match="unknown to the tokenizer"):
        load_calibration_data(None, {"tokenizer.json": path}, vocab_size=2048)


def test_tokenizer_that_falls_back_to_bytes_is_reported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ᛫ᚠᛁᚱᚪ᛫ᚷᛖᚻᚹᛦᛚᚳᚢᛗ " * 40)
    data = _load(checkpoint, path)
    assert any("tokens of a byte" in warning for warning in data.warnings)


def test_checkpoint_without_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_calibration_data(None, {}, vocab_size=2048)
