"""Damage that once reached torch, transformers or the bundle writer is refused when a checkpoint is opened."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenforge.errors import UserError
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.config import ModelConfig
from support.checkpoints import make_checkpoint

Damage = Callable[[Path], Any]
WEIGHTS, GENERATION, INDEX = "model.safetensors", "generation_config.json", "model.safetensors.index.json"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
MOE = {"model_type": "qwen2_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file; copy before damaging it."""
    return make_checkpoint(tmp_path_factory.mktemp("pristine"), "qwen2", tokenizer=False, num_hidden_layers=1)


@pytest.fixture(scope="session")
def pristine_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two shards; copy before damaging it."""
    return make_checkpoint(tmp_path_factory.mktemp("shards"), "qwen2", tokenizer=False, num_hidden_layers=1, shards=2)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(pristine_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_shards, tmp_path / "checkpoint"))


def refusal(folder: Path) -> str:
    """The one sentence that opening ``folder`` is refused with."""
    with pytest.raises(UserError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


CONFIG: list[tuple[dict[str, Any], str]] = [
    ({"rope_theta": 10**400}, "'rope_theta' must be a positive number from 2 to 1e+30"),
    ({"rope_theta": 1e-300}, "'rope_theta' must be a positive number from 2"),
    ({"rope_theta": 1.0}, "'rope_theta' must be a positive number from 2"),
    ({"rope_parameters": {"rope_theta": 1e300}}, "'rope_theta' must be a positive number from 2"),
    ({"rope_parameters": YARN | {"factor": 1e300}}, "'factor' must be a positive number from 1 to 1e+09"),
    ({"rope_parameters": YARN | {"factor": 0.5}}, "'factor' must be a positive number from 1"),
    ({"rope_parameters": YARN | {"attention_factor": 1e30}}, "'attention_factor' must be a positive number from 0.001"),
    ({"rope_parameters": YARN | {"truncate": "false"}}, "'truncate' must be true or false, not 'false'"),
    ({"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 32}}, "'beta_fast' must not be below 'beta_slow' (32)"),
    ({"rope_parameters": YARN | {"type": "linear"}}, "'type' contradicts 'rope_type' ('yarn'), not 'linear'"),
    ({"rope_parameters": False}, "'rope_parameters' must be an object or null, not False"),
    ({"rope_scaling": 0}, "'rope_scaling' must be an object or null, not 0"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": YARN},
        "'rope_scaling' contradicts 'rope_parameters', so that only one of them may be given",
    ),
    ({"rms_norm_eps": 1e300}, "'rms_norm_eps' must be a positive number from 1e-30 to 0.01"),
    ({"rms_norm_eps": 1e-300}, "'rms_norm_eps' must be a positive number from 1e-30"),
    ({"max_position_embeddings": 1}, "'max_position_embeddings' must be an integer from 16"),
    ({"sliding_window": "x"}, "'sliding_window' must be an integer from 0"),
    ({"eos_token_id": -1}, "'eos_token_id' must be a token number or a list of them, not -1"),
    ({"eos_token_id": [257, "x"]}, "'eos_token_id' must be a token number or a list of them"),
    ({"bos_token_id": [1, 2]}, "'bos_token_id' must be a token number, not [1, 2]"),
    ({"pad_token_id": True}, "'pad_token_id' must be a token number"),
    ({"initializer_range": float("nan")}, "'initializer_range' holds nan, not a finite number"),
    ({"id2label": {"0": [float("inf")]}}, "'id2label' holds inf, not a finite number"),
    ({"tokenizer_class": "\ud800"}, "'tokenizer_class' holds half of a surrogate pair"),
    (MOE | {"mlp_only_layers": [1]}, "'mlp_only_layers' must be a list of layer numbers below 1, not [1]"),
    (MOE | {"mlp_only_layers": [-1]}, "'mlp_only_layers' must be a list of layer numbers below 1"),
    (MOE | {"mlp_only_layers": {}}, "'mlp_only_layers' must be a list of layer numbers"),
]


@pytest.mark.parametrize(("fields", "expected"), CONFIG)
def test_impossible_configuration_is_refused_by_field(folder: Path, fields: dict[str, Any], expected: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    if fields.get("model_type") == "qwen2_moe":
        config["architectures"] = ["Qwen2MoeForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config | fields))
    message = refusal(folder)
    assert message.startswith(str(folder / "config.json")) and expected in message
    assert message.endswith("; correct the file")


def test_fields_that_decide_nothing_are_kept_from_transformers(pristine: Path) -> None:
    pytest.importorskip("transformers")
    source = json.loads((pristine / "config.json").read_text())
    odd = {"return_dict": False, "attention_dropout": "none", "num_labels": "two", "id2label": [1], "_odd": {}}
    odd |= {"pruned_heads": {}, "per_layer_config": [], "quantization_config": {}, "auto_map": None}
    given, plain = ModelConfig.parse(source | odd), ModelConfig.parse(source)
    assert given == plain
    assert given.to_transformers().to_dict() == plain.to_transformers().to_dict()
    assert given.to_transformers().return_dict is True


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


FILES: dict[str, tuple[Damage, str]] = {
    "field twice": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 32, "hidden_size": 64')
        ),
        "config.json lists 'hidden_size' twice: keep one of them",
    ),
    "field nested deeply": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"hidden_size": 64', f'"hidden_size": {"[" * 900}{"]" * 900}')
        ),
        "config.json: 'hidden_size' is nested more than 32 deep",
    ),
    "config of 100 GB": (lambda f: os.truncate(f / "config.json", 100 << 30), "config.json is larger than 67108864"),
    "list for one token": (write(GENERATION, '{"bos_token_id": [1]}'), "'bos_token_id' must be a token number"),
    "huge token": (write(GENERATION, f'{{"pad_token_id": {10**30}}}'), "'pad_token_id' must be a token number"),
    "nested NaN": (write(GENERATION, '{"a": {"b": [NaN]}}'), f"{GENERATION}: 'a' holds nan, not a finite number"),
    "half character": (write(GENERATION, '{"a": {"\\ud800": 1}}'), f"{GENERATION}: 'a' holds half of a surrogate"),
    "dangling generation config": (
        lambda f: ((f / GENERATION).unlink(), (f / GENERATION).symlink_to("gone")),
        "names 'generation_config.json', which is missing",
    ),
}


@pytest.mark.parametrize("damage", FILES)
def test_damaged_json_file_is_refused_by_name(folder: Path, damage: str) -> None:
    edit, expected = FILES[damage]
    edit(folder)
    message = refusal(folder)
    assert str(folder) in message and expected in message


@pytest.mark.parametrize("name", ["\ud800", "a" * 5000, "a/" * 3000])
def test_index_naming_what_no_file_can_be_called_is_refused(sharded: Path, name: str) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][EMBEDDING] = name
    (sharded / INDEX).write_text(json.dumps(index))
    message = refusal(sharded)
    assert message.startswith(str(sharded / INDEX)) and "which no file can be called" in message


def test_index_listing_a_tensor_twice_is_refused(sharded: Path) -> None:
    text = (sharded / INDEX).read_text().replace('"weight_map": {', f'"weight_map": {{"{EMBEDDING}": "gone",')
    (sharded / INDEX).write_text(text)
    assert f"lists '{EMBEDDING}' twice" in refusal(sharded)


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def store(path: Path, header: dict[str, Any], data: bytes, length: int = 0) -> None:
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


HEADER: list[tuple[dict[str, Any], str]] = [
    ({"shape": [1 << 61] * 20_000}, f"tensor '{NORM}' has the impossible shape [2305"),
    ({"shape": [1] * 100_000 + [64]}, f"tensor '{NORM}' has the impossible shape [1, 1"),
    ({"dtype": "F" * 100_000}, f"tensor '{NORM}' has the unknown dtype 'FFFF"),
    ({"data_offsets": [1] * 100_000}, f"tensor '{NORM}' has impossible data offsets [1, 1"),
]


@pytest.mark.parametrize(("fields", "expected"), HEADER)
def test_absurdly_long_header_entry_is_refused_in_a_short_sentence(
    folder: Path, fields: dict[str, Any], expected: str
) -> None:
    header, data = read(folder / WEIGHTS)
    header[NORM] |= fields
    store(folder / WEIGHTS, header, data)
    assert expected in refusal(folder)


def test_absurdly_long_tensor_name_is_refused_in_a_short_sentence(folder: Path) -> None:
    header, data = read(folder / WEIGHTS)
    store(folder / WEIGHTS, header | {"x" * 100_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, data)
    assert "has a name of 100000 characters" in refusal(folder)


def test_header_whose_length_begins_like_a_pickle_is_read(folder: Path) -> None:
    header, data = read(folder / WEIGHTS)
    store(folder / WEIGHTS, header, data, length=(1 << 16) + 640)
    assert (folder / WEIGHTS).read_bytes().startswith(b"\x80\x02")
    assert NORM in Checkpoint.open(folder).names


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_of_any_protocol_is_called_one(folder: Path, protocol: int) -> None:
    (folder / WEIGHTS).write_bytes(bytes([0x80, protocol]) + b"\x95" + bytes(100))
    assert "is a PyTorch pickle, not safetensors" in refusal(folder)


def test_weights_that_end_in_zeros_are_refused_by_a_norm(folder: Path) -> None:
    header, data = read(folder / WEIGHTS)
    store(folder / WEIGHTS, header, data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    message = refusal(folder)
    assert f"{WEIGHTS}: tensor 'model.layers.0.input_layernorm.weight' holds nothing but zeros" in message


@pytest.mark.parametrize(("name", "expected"), [("a" * 5000, "cannot be reached"), ("a\udcff", "is not valid UTF-8")])
def test_path_that_no_checkpoint_can_have_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    assert expected in refusal(tmp_path / name)
