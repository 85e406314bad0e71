"""Opening checkpoints: what transformers loads is what we read, and damage is named."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenforge.errors import CheckpointError, UserError
from qwenforge.exporter.checkpoint import Checkpoint, CheckpointTensor
from qwenforge.exporter.weights import leaves
from support.checkpoints import Kind, make_checkpoint

Edit = Callable[[dict[str, Any]], Any]
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
SHARD = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-file dense checkpoint without tokenizer; copy before damaging it."""
    return make_checkpoint(tmp_path_factory.mktemp("pristine"), "qwen2", tokenizer=False, num_hidden_layers=1)


@pytest.fixture(scope="session")
def pristine_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards; copy before damaging it."""
    folder = tmp_path_factory.mktemp("pristine_shards")
    return make_checkpoint(folder, "qwen2", tokenizer=False, num_hidden_layers=1, shards=2)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(pristine_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_shards, tmp_path / "checkpoint"))


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def edit_header(path: Path, edit: Edit) -> None:
    header, data = split(path)
    edit(header)
    join(path, json.dumps(header).encode(), data)


def edit_json(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def rewrite(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Change the stored arrays of a single-file float32 checkpoint and write a valid file."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "model.safetensors")
    edit(arrays)
    save_file(arrays, folder / "model.safetensors")


MADE: list[tuple[Kind, dict[str, Any]]] = [
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"dtype": "bfloat16", "shards": 2, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 10}),
    ("qwen2_moe", {"shards": 3, "mlp_only_layers": [0]}),
    ("qwen2_moe", {"layout": "stacked", "dtype": "float16"}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, "dtype": "bfloat16"}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"layout": "stacked", "shards": 2}),
]


@pytest.mark.parametrize(("kind", "options"), MADE)
def test_state_tensors_equal_what_transformers_loads(tmp_path: Path, kind: Kind, options: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(tmp_path, kind, **options)
    checkpoint = Checkpoint.open(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    for name, theirs in model.state_dict().items():
        ours = checkpoint.state_tensor(name)
        assert ours.dtype.name.lower() in str(theirs.dtype).replace("float32", "float")
        np.testing.assert_array_equal(ours.numpy().astype(np.float32), theirs.float().numpy(), err_msg=name)
    assert list(checkpoint.tokenizer_files) == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert checkpoint.generation_config["eos_token_id"] == [257, 256]
    assert checkpoint.total_bytes == sum(checkpoint.tensor(name).nbytes for name in checkpoint.names)


def test_leaves_remember_their_name_and_are_new_objects(pristine: Path) -> None:
    checkpoint = Checkpoint.open(pristine)
    tensor = checkpoint.tensor(NORM)
    tensor.name = "renamed by a graph"
    assert tensor.checkpoint_name == NORM
    assert checkpoint.tensor(NORM).name == NORM
    (leaf,) = leaves(checkpoint.state_tensor(EMBEDDING))
    assert isinstance(leaf, CheckpointTensor)


def test_sizes_and_fingerprint(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.largest_tensor_bytes() == 320 * 64 * 4
    assert checkpoint.largest_tensor_bytes(ir.DataType.BFLOAT16) == 320 * 64 * 2
    before = checkpoint.fingerprint()
    assert before == Checkpoint.open(folder).fingerprint()
    edit_json(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-5))
    changed = Checkpoint.open(folder).fingerprint()
    assert changed != before
    rewrite(folder, lambda arrays: arrays.update({NORM: arrays[NORM].astype(np.float16)}))
    assert Checkpoint.open(folder).fingerprint() not in (before, changed)


@pytest.mark.parametrize("present", [EMBEDDING, HEAD])
def test_either_of_two_tied_tensors_stands_for_the_other(folder: Path, present: str) -> None:
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    rewrite(folder, lambda arrays: arrays.pop({EMBEDDING: HEAD, HEAD: EMBEDDING}[present]))
    checkpoint = Checkpoint.open(folder)
    for name in (EMBEDDING, HEAD):
        np.testing.assert_array_equal(checkpoint.state_tensor(name).numpy(), checkpoint.tensor(present).numpy())


def test_tied_configuration_with_both_tensors_uses_each_as_transformers_does(folder: Path) -> None:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    checkpoint = Checkpoint.open(folder)
    for name in (EMBEDDING, HEAD):
        np.testing.assert_array_equal(checkpoint.state_tensor(name).numpy(), state[name].numpy())


def test_saved_rotary_buffers_are_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda arrays: arrays.update({name: np.ones(8, dtype=np.float64)}))
    assert name not in Checkpoint.open(folder).names


def test_optional_files_may_be_absent(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.generation_config, checkpoint.tokenizer_files) == ({}, {})


def test_hugging_face_cache_layout_is_accepted(pristine_shards: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(pristine_shards.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    checkpoint = Checkpoint.open(snapshot)
    expected = Checkpoint.open(pristine_shards)
    np.testing.assert_array_equal(checkpoint.tensor(NORM).numpy(), expected.tensor(NORM).numpy())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(pristine_shards / "config.json")
    with pytest.raises(CheckpointError, match=r"'config.json', a link to .* outside the checkpoint folder"):
        Checkpoint.open(snapshot)


def damage_shape(header: dict[str, Any]) -> None:
    header[NORM]["shape"] = [8, 8]


HEADER_DAMAGE: dict[str, tuple[Edit, str]] = {
    "offset beyond the file": (
        lambda h: h[NORM].update(data_offsets=[h[NORM]["data_offsets"][0], 10**12]),
        rf"tensor '{NORM}' should end at byte .* but the file has .* bytes: it is truncated",
    ),
    "wrong byte count": (lambda h: h[NORM].update(shape=[63]), rf"tensor '{NORM}' of shape \[63\] .* needs 252 bytes"),
    "wrong dtype": (lambda h: h[NORM].update(dtype="F16"), "needs 128 bytes but the header gives it 256"),
    "unknown dtype": (lambda h: h[NORM].update(dtype="F31"), "has the unknown dtype 'F31'"),
    "dtype no text": (lambda h: h[NORM].update(dtype=[]), r"has the unknown dtype \[\]"),
    "negative shape": (lambda h: h[NORM].update(shape=[-64]), r"has the impossible shape \[-64\]"),
    "shape of strings": (lambda h: h[NORM].update(shape=["64"]), "has the impossible shape"),
    "huge shape": (lambda h: h[NORM].update(shape=[1 << 61, 1 << 61]), "needs .* bytes but the header gives it 256"),
    "offsets reversed": (lambda h: h[NORM]["data_offsets"].reverse(), "has impossible data offsets"),
    "one offset": (lambda h: h[NORM]["data_offsets"].pop(), "has impossible data offsets"),
    "fractional offset": (lambda h: h[NORM].update(data_offsets=[0.5, 256.5]), "has impossible data offsets"),
    "no offsets": (lambda h: h[NORM].pop("data_offsets"), "lacks dtype, shape or data_offsets"),
    "entry no object": (lambda h: h.update({NORM: 3}), "lacks dtype, shape or data_offsets"),
    "overlap": (
        lambda h: h[NORM].update(data_offsets=[v - 64 for v in h[NORM]["data_offsets"]]),
        rf"tensor '{NORM}' overlaps ",
    ),
    "unclaimed bytes": (
        lambda h: h.pop(EMBEDDING),
        r"81920 bytes (before tensor '.*'|at the end) belong to no tensor",
    ),
    "other shape of the same size": (
        damage_shape, rf"tensor '{NORM}' has shape \[8, 8\] but config.json makes it \[64\]"
    ),
    "renamed": (lambda h: h.update({"model.norm.scale": h.pop(NORM)}), rf"lacks tensor '{NORM}', which config.json"),
    "integers": (lambda h: h[NORM].update(dtype="I32"), rf"tensor '{NORM}' has dtype I32, only F32, F16, BF16"),
}  # fmt: skip


@pytest.mark.parametrize("damage", HEADER_DAMAGE)
def test_lying_header_is_refused_naming_file_and_tensor(folder: Path, damage: str) -> None:
    edit, message = HEADER_DAMAGE[damage]
    edit_header(folder / "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert str(folder / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


def damage_bytes(folder: Path) -> dict[str, tuple[Callable[[Path], Any], str]]:
    """Damage done to the bytes of a weights file, and the sentence expected."""
    header, data = split(folder / "model.safetensors")
    text = json.dumps(header).encode()
    twice = text[:-1] + b", " + json.dumps(NORM).encode() + b": " + json.dumps(header[NORM]).encode() + b"}"
    return {
        "cut in the data": (lambda f: f.write_bytes(f.read_bytes()[:-1000]), "should end at byte .* it is truncated"),
        "cut in the header": (lambda f: f.write_bytes(f.read_bytes()[:100]), "claims a header of .* it is truncated"),
        "cut to nothing": (lambda f: f.write_bytes(b""), "has 0 bytes, too few"),
        "absurd length": (lambda f: f.write_bytes(b"\xff" * 8 + b"{}"), "claims a header of 18446744073709551615"),
        "trailing bytes": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "1 bytes at the end belong to no tensor"),
        "bad JSON": (lambda f: join(f, text[:-1], data), "the header is not valid JSON"),
        "deep JSON": (lambda f: join(f, b"[" * 100_000, b""), "the header is not valid JSON"),
        "not UTF-8": (lambda f: join(f, b"\xff" + text, data), "the header is not valid JSON"),
        "no object": (lambda f: join(f, b"[1]", b""), "the header is not a JSON object"),
        "repeated name": (lambda f: join(f, twice, data), f"the header lists '{NORM}' twice"),
        "empty header": (lambda f: join(f, b"{}", b""), rf"lacks tensor '{EMBEDDING}' \(and 14 more\)"),
        "git LFS pointer": (
            lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
            "is a Git LFS pointer, not the weights: run 'git lfs pull'",
        ),
        "GGUF": (lambda f: f.write_bytes(b"GGUF" + b"\0" * 100), "is a GGUF file"),
        "pickle": (lambda f: f.write_bytes(b"PK\x03\x04" + b"\0" * 100), "is a PyTorch pickle"),
        "web page": (lambda f: f.write_bytes(b"<!DOCTYPE html><html>404"), "is a web page"),
        "folder": (lambda f: (f.unlink(), f.mkdir()), "names 'model.safetensors', which is missing"),
    }


@pytest.mark.parametrize("index", range(16))
def test_damaged_weights_file_is_refused_naming_the_file(folder: Path, index: int) -> None:
    damage, message = list(damage_bytes(folder).values())[index]
    damage(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.pop(NORM), rf"lacks tensor '{NORM}', which config.json asks for"),
        (lambda a: (a.pop(NORM), a.pop(HEAD)), rf"lacks tensor '{NORM}' \(and 1 more\)"),
        (lambda a: a.update(odd=np.ones(2)), "holds tensor 'odd', which config.json leaves no place for"),
        (lambda a: a.update({NORM: np.ones(63, np.float32)}), r"has shape \[63\] but config.json makes it \[64\]"),
        (lambda a: a.update({HEAD: a[HEAD].T.copy()}), r"has shape \[64, 320\] but config.json makes it \[320, 64\]"),
        (lambda a: a.update({NORM: np.ones(64, np.float64)}), "has dtype F64, only F32, F16, BF16"),
        (lambda a: a.update({NORM: np.ones(64, np.int8)}), "has dtype I8"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_refused(folder: Path, edit: Any, message: str) -> None:
    rewrite(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_experts_stored_in_two_ways_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2_moe", tokenizer=False)
    extra = np.zeros((6, 96, 64), np.float32)
    rewrite(folder, lambda arrays: arrays.update({"model.layers.0.mlp.experts.gate_up_proj": extra}))
    with pytest.raises(CheckpointError, match=r"lacks tensor 'model.layers.0.mlp.experts.down_proj'"):
        Checkpoint.open(folder)


def test_experts_of_different_dtypes_are_stacked_in_float32(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3_moe", tokenizer=False)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    rewrite(folder, lambda arrays: arrays.update({name: arrays[name].astype(np.float16)}))
    checkpoint = Checkpoint.open(folder)
    stacked = checkpoint.state_tensor("model.layers.0.mlp.experts.gate_up_proj").numpy()
    assert stacked.dtype == np.float32
    np.testing.assert_array_equal(stacked[1, 48:], checkpoint.tensor(name).numpy().astype(np.float32))


def test_missing_expert_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2_moe", tokenizer=False)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    rewrite(folder, lambda arrays: arrays.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks tensor '{name}'"):
        Checkpoint.open(folder)


def weight_map(edit: Edit) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, lambda index: edit(index["weight_map"]))


def escape_by_link(folder: Path) -> None:
    shutil.move(folder / SHARD, folder.parent / "elsewhere.safetensors")
    (folder / SHARD).symlink_to(folder.parent / "elsewhere.safetensors")


def escape_by_folder_link(folder: Path) -> None:
    (folder.parent / "far").mkdir()
    shutil.move(folder / SHARD, folder.parent / "far" / SHARD)
    (folder / "sub").symlink_to(folder.parent / "far")
    weight_map(lambda m: m.update({k: f"sub/{SHARD}" for k, v in m.items() if v == SHARD}))(folder)


INDEX_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "parent folder": (weight_map(lambda m: m.update({EMBEDDING: "../x.safetensors"})), "outside the checkpoint folder"),
    "absolute path": (weight_map(lambda m: m.update({EMBEDDING: "/etc/passwd"})), "names '/etc/passwd', outside"),
    "backslashes": (weight_map(lambda m: m.update({EMBEDDING: "..\\x"})), "outside the checkpoint folder"),
    "empty name": (weight_map(lambda m: m.update({EMBEDDING: ""})), "names '', outside"),
    "escaping link": (escape_by_link, "a link to .*elsewhere.safetensors outside the checkpoint folder: copy the file"),
    "escaping folder link": (escape_by_folder_link, "a link to .* outside the checkpoint folder"),
    "missing shard": (lambda f: (f / SHARD).unlink(), f"names '{SHARD}', which is missing"),
    "unknown shard": (weight_map(lambda m: m.update({EMBEDDING: "gone.safetensors"})), "which is missing"),
    "folder as shard": (weight_map(lambda m: m.update({EMBEDDING: "."})), "names '.', which is missing"),
    "other shard": (
        weight_map(lambda m: m.update({EMBEDDING: SECOND})), f"tensor '{EMBEDDING}', which is listed in {SECOND}"
    ),
    "unlisted tensor": (weight_map(lambda m: m.pop(EMBEDDING)), f"tensor '{EMBEDDING}', which is not listed in"),
    "absent tensor": (weight_map(lambda m: m.update(ghost=SECOND)), f"{SECOND} lacks tensor 'ghost', which"),
    "no text": (weight_map(lambda m: m.update({EMBEDDING: 1})), f"gives tensor '{EMBEDDING}' the file 1"),
    "no weight_map": (lambda f: edit_json(f / INDEX, lambda i: i.pop("weight_map")), "has no 'weight_map'"),
    "weight_map a list": (lambda f: edit_json(f / INDEX, lambda i: i.update(weight_map=[1])), "has no 'weight_map'"),
    "bad JSON": (lambda f: (f / INDEX).write_text("{"), "cannot be read as JSON"),
    "no object": (lambda f: (f / INDEX).write_text("[]"), "must hold a JSON object"),
    "LFS pointer shard": (
        lambda f: (f / SHARD).write_text("version https://git-lfs.github.com/spec/v1\n"),
        f"{SHARD} is a Git LFS pointer",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), "download the index too"),
}  # fmt: skip


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_damaged_index_is_refused_in_one_sentence(sharded: Path, damage: str) -> None:
    edit, message = INDEX_DAMAGE[damage]
    edit(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(sharded)
    assert "\n" not in str(caught.value)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def only(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return edit


FOLDER_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (shutil.rmtree, "does not exist"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "is a file: give the checkpoint folder"),
    "empty": (empty, "is empty: download the checkpoint into it"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json must hold a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors: download the weights"),
    "pickle": (only("pytorch_model.bin"), "holds PyTorch pickle weights only"),
    "GGUF": (only("model.gguf"), "holds GGUF files"),
    "adapter": (only("adapter_model.safetensors"), "holds a LoRA adapter"),
    "odd name": (only("weights.safetensors"), "neither model.safetensors nor"),
    "bad generation config": (lambda f: (f / "generation_config.json").write_text("nul"), "generation_config.json can"),
    "dangling link": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").symlink_to("gone")), "which is missing"
    ),
    "escaping tokenizer": (lambda f: (f / "tokenizer.json").symlink_to(f.parent), "'tokenizer.json', a link to"),
}  # fmt: skip


@pytest.mark.parametrize("damage", FOLDER_DAMAGE)
def test_folder_that_is_no_checkpoint_is_refused_with_advice(folder: Path, damage: str) -> None:
    edit, message = FOLDER_DAMAGE[damage]
    edit(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_header_bytes_never_escape_as_internal_errors(
    pristine: Path, tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        folder.mkdir()
        os.link(pristine / "config.json", folder / "config.json")
    content = bytearray((pristine / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(bytes(content))
    checkpoint, message = None, ""
    try:
        checkpoint = Checkpoint.open(folder)
    except UserError as error:
        message = str(error)
    assert checkpoint is not None or str(folder) in message
    if checkpoint is not None:
        assert all(checkpoint.tensor(name).numpy().size for name in checkpoint.names)
