"""Checkpoints of real geometries: the right sizes, the same weights each time, and nobody's files overwritten."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenforge.bench import geometries
from qwenforge.bench.geometries import EXAMPLE, GEOMETRIES, STANDARD_DEVIATION, main, tensor_shapes, write_checkpoint
from qwenforge.errors import UserError
from qwenforge.exporter.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("geometries") / "deep" / "tiny", "tiny")


@pytest.mark.parametrize(
    ("geometry", "parameters"),
    [
        ("0.5b", 494_032_768),
        ("1.5b", 1_543_714_304),
        ("7b", 7_615_616_512),
        ("moe-a2.7b", 14_315_784_192),
        ("tiny", 107_072),
    ],
)
def test_parameters_are_those_of_the_official_model(geometry: str, parameters: int) -> None:
    shapes = tensor_shapes(GEOMETRIES[geometry])
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_checkpoint_is_what_the_exporter_and_transformers_read(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Checkpoint.open(tiny)
    assert source.config.num_hidden_layers == 2 and source.config.tie_word_embeddings
    assert source.generation_config["eos_token_id"] == [257]
    model, loading = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.num_parameters() == 107_072
    assert AutoTokenizer.from_pretrained(tiny)("née").input_ids == Tokens("née")


class Tokens(list[int]):
    """The byte tokens of a text: each byte's place in the sorted byte-level alphabet."""

    def __init__(self, text: str) -> None:
        from tokenizers import pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
        super().__init__(alphabet.index(symbol) for piece, _ in pieces for symbol in piece)


def test_weights_are_spread_as_at_initialization(tiny: Path) -> None:
    source = Checkpoint.open(tiny)
    embedding = source.tensor("model.embed_tokens.weight").numpy()
    assert abs(float(embedding.mean())) < 0.05 * STANDARD_DEVIATION
    assert float(embedding.std()) == pytest.approx(STANDARD_DEVIATION, rel=0.02)
    norm = source.tensor("model.norm.weight").numpy()
    assert float(np.abs(norm - 1).max()) < 6 * STANDARD_DEVIATION


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_dtype_changes_the_rounding_only(tiny: Path, tmp_path: Path, dtype: str) -> None:
    stored = Checkpoint.open(write_checkpoint(tmp_path, "tiny", dtype=dtype))
    for name in stored.names:
        exact = Checkpoint.open(tiny).tensor(name).numpy()
        kind = stored.tensor(name).dtype.numpy()
        np.testing.assert_array_equal(stored.tensor(name).numpy(), exact.astype(kind))
    assert np.dtype(kind).itemsize == {"fp32": 4, "fp16": 2, "bf16": 2}[dtype]


def test_weights_do_not_depend_on_the_blocks_they_are_written_in(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometries, "_BLOCK", 1000)
    write_checkpoint(tmp_path, "tiny")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tiny / name).read_bytes()


def test_complete_folder_is_left_as_it_is(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometries, "_write_weights", None)
    assert write_checkpoint(tiny, "tiny") == tiny


def test_folder_without_its_last_file_is_written_again(tmp_path: Path) -> None:
    """A writer that was killed has not come to config.json."""
    folder = write_checkpoint(tmp_path, "tiny")
    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    Checkpoint.open(write_checkpoint(folder, "tiny"))


def test_other_dtype_replaces_our_own_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "tiny", dtype="fp32")
    large = (tmp_path / "model.safetensors").stat().st_size
    write_checkpoint(tmp_path, "tiny", dtype="bf16")
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * large
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_checkpoint_of_somebody_else_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEOMETRIES["tiny"]))
    (tmp_path / "model.safetensors").write_text("trained for a week")
    assert main(["tiny", "-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path} holds another checkpoint, which would be overwritten; choose another folder\n"
    )
    assert (tmp_path / "model.safetensors").read_text() == "trained for a week"


def test_unwritable_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/inside: Not a directory; choose another folder"):
        write_checkpoint(tmp_path / "file" / "inside", "tiny")


def test_program_writes_the_checkpoint_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "-o", str(tmp_path / "out"), "--dtype", "fp16"]) == 0
    assert tuple(capsys.readouterr()) == ("", "")
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == GEOMETRIES["tiny"] | {"torch_dtype": "float16"}


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and EXAMPLE in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["70b", "-o", "x"], ["tiny"], ["tiny", "-o", "x", "--dtype", "int4"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and capsys.readouterr().out == ""
