"""Every damaged, incomplete, changed or newer bundle is refused with one sentence that names what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenforge.bundle import Bundle, BundleWriter, ReferenceLogits
from qwenforge.digests import QUICK_LIMIT, header_sha256, sampled_sha256
from qwenforge.errors import BundleError
from qwenforge.manifest import Verification
from support.bundle_builder import bundle_facts, edit_manifest, reference_logits, write_bundle

Damage = Callable[[Path], Any]


def overwrite(name: str, data: bytes) -> Damage:
    return lambda bundle: (bundle / name).write_bytes(data)


def remove(name: str) -> Damage:
    return lambda bundle: (bundle / name).unlink()


def flip(name: str, at: int) -> Damage:
    def damage(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[at] ^= 1
        (bundle / name).write_bytes(data)

    return damage


def replace_by(name: str, make: Callable[[Path], Any]) -> Damage:
    def damage(bundle: Path) -> None:
        (bundle / name).unlink()
        make(bundle / name)

    return damage


def forge(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """Edit the manifest and renew its checksum: the fields themselves must give the damage away."""
    return lambda bundle: edit_manifest(bundle, edit)


def put(path: str, value: Any) -> Damage:
    """Forge the field at the dotted ``path``; ``...`` deletes it."""

    def edit(manifest: dict[str, Any]) -> None:
        fields: Any = manifest
        *parents, last = path.split("/")
        for parent in parents:
            fields = fields[int(parent)] if isinstance(fields, list) else fields[parent]
        if value is ...:
            del fields[last]
        else:
            fields[last] = value

    return forge(edit)


def rename_file(old: str, new: str) -> Damage:
    return forge(lambda fields: fields["files"].update({new: fields["files"].pop(old)}))


def escape_through_link(bundle: Path) -> None:
    outside = bundle.parent / "outside.data"
    shutil.move(bundle / "model.onnx.data", outside)
    (bundle / "model.onnx.data").symlink_to(outside)


def move_into_linked_folder(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    outside.mkdir()
    shutil.move(bundle / "model.onnx.data", outside / "data")
    (bundle / "inner").symlink_to(outside)
    rename_file("model.onnx.data", "inner/data")(bundle)


def swap_files(bundle: Path) -> None:
    for name, other in (("tokenizer.json", "x"), ("generation_config.json", "tokenizer.json")):
        shutil.move(bundle / name, bundle / other)
    shutil.move(bundle / "x", bundle / "generation_config.json")


DAMAGES: dict[str, tuple[Damage, str]] = {
    # The manifest as a file
    "no_manifest": (remove("manifest.json"), "is not a qwenforge bundle: it has no manifest.json"),
    "empty_manifest": (overwrite("manifest.json", b""), "manifest.json is not valid JSON"),
    "manifest_cut_short": (
        lambda bundle: os.truncate(bundle / "manifest.json", 700),
        "manifest.json is not valid JSON",
    ),
    "manifest_is_binary": (overwrite("manifest.json", b"\x89PNG\xff\xfe"), "manifest.json is not valid JSON"),
    "manifest_is_list": (overwrite("manifest.json", b"[]"), "manifest.json is not a JSON object"),
    "manifest_is_number": (overwrite("manifest.json", b"1"), "manifest.json is not a JSON object"),
    "manifest_is_folder": (replace_by("manifest.json", Path.mkdir), "it has no manifest.json"),
    "manifest_is_link": (replace_by("manifest.json", lambda p: p.symlink_to("/etc/hostname")), "no manifest.json"),
    "manifest_nested_deeply": (overwrite("manifest.json", b'{"a":' * 100_000), "manifest.json"),
    "manifest_holds_nan": (overwrite("manifest.json", b'{"schema_version": NaN}'), "NaN is not JSON"),
    "manifest_huge": (
        lambda bundle: os.truncate(bundle / "manifest.json", 1 << 30),
        "larger than 33554432 bytes",
    ),
    "manifest_empty_object": (overwrite("manifest.json", b"{}"), "the field source is missing"),
    # The manifest's fields
    "newer_schema": (put("schema_version", 2), "newer than schema 1 .* update qwenforge"),
    "much_newer_schema": (forge(lambda fields: {"schema_version": 99}), "has schema 99.* update qwenforge"),
    "schema_zero": (put("schema_version", 0), "schema_version: input should be 1"),
    "schema_text": (put("schema_version", "1"), "schema_version: input should be 1"),
    "schema_absent": (put("schema_version", ...), "schema_version is missing"),
    "field_absent": (put("limits", ...), "the field limits is missing"),
    "nested_field_absent": (put("model/head_dim", ...), "the field model.head_dim is missing"),
    "files_absent": (put("files", ...), "the field files is missing"),
    "unknown_field": (put("plugins", []), "the field plugins is unknown"),
    "unknown_nested_field": (put("limits/max_beams", 4), "the field limits.max_beams is unknown"),
    "text_for_number": (put("limits/max_length", "64"), "limits.max_length: input should be a valid integer"),
    "fraction_for_number": (put("limits/max_length", 64.5), "limits.max_length: input should be a valid integer"),
    "truth_for_number": (put("model/head_dim", True), "model.head_dim: input should be a valid integer"),
    "number_for_truth": (put("verification/performed", 1), "verification.performed: input should be a valid boolean"),
    "null_for_text": (put("target", None), "target: input should be a valid string"),
    "zero_length": (put("limits/max_length", 0), "limits.max_length: input should be greater"),
    "negative_head_dim": (put("model/head_dim", -8), "model.head_dim: input should be greater"),
    "negative_token": (put("eos_token_ids", [-1]), "eos_token_ids.0: input should be greater"),
    "negative_dimension": (put("inputs/0/shape", [-1]), "inputs.0.shape.0"),
    "no_inputs": (put("inputs", []), "inputs: tuple should have at least 1"),
    "same_input_twice": (put("inputs/1/name", "input_ids"), "two inputs or two outputs have the same name"),
    "unknown_weights_kind": (put("weights", "borrow"), "weights: input should be 'copy' or 'link'"),
    "verified_by_nothing": (put("verification/method", None), "verification names its method"),
    "infinite_error": (
        lambda bundle: (bundle / "manifest.json").write_text(
            (bundle / "manifest.json").read_text().replace("1000000.0", "1e400")
        ),
        "1e400 is too large",
    ),
    "model_not_listed": (put("files/model.onnx", ...), "files does not list model.onnx"),
    "hash_not_hexadecimal": (put("files/model.onnx/sha256", "z" * 64), "files.model.onnx.sha256: string should match"),
    "hash_too_short": (put("files/model.onnx/sha256", "ab"), "files.model.onnx.sha256: string should match"),
    "file_listed_twice": (
        put("linked_files", {"model.onnx": {"bytes": 5, "header_sha256": "0" * 64, "sampled_sha256": "0" * 64}}),
        "model.onnx is listed both",
    ),
    # File names in the manifest
    "absolute_name": (rename_file("tokenizer.json", "/etc/hostname"), "'/etc/hostname' is not a plain relative"),
    "parent_name": (rename_file("tokenizer.json", "../tokenizer.json"), "is not a plain relative file name"),
    "hidden_parent_name": (rename_file("tokenizer.json", "a/../../t"), "is not a plain relative file name"),
    "windows_name": (rename_file("tokenizer.json", "..\\tokenizer.json"), "is not a plain relative file name"),
    "drive_name": (rename_file("tokenizer.json", "C:tokenizer.json"), "is not a plain relative file name"),
    "nul_name": (rename_file("tokenizer.json", "a\0b"), "is not a plain relative file name"),
    "empty_name": (rename_file("tokenizer.json", ""), "is not a plain relative file name"),
    "dot_name": (rename_file("tokenizer.json", "./tokenizer.json"), "is not a plain relative file name"),
    "manifest_lists_itself": (rename_file("tokenizer.json", "manifest.json"), "manifest.json cannot list itself"),
    "overlong_name": (rename_file("tokenizer.json", "t" * 300), "cannot be reached"),
    # A manifest edited by hand, its fields well-formed
    "edited_limit": (
        lambda bundle: edit_manifest(bundle, lambda fields: fields["limits"].update(max_length=4096), sign=False),
        "does not agree with its own checksum",
    ),
    "edited_stop_token": (
        lambda bundle: edit_manifest(bundle, lambda fields: fields.update(eos_token_ids=[2]), sign=False),
        "does not agree with its own checksum",
    ),
    "checksum_absent": (
        lambda bundle: (bundle / "manifest.json").write_text(
            json.dumps({k: v for k, v in json.loads((bundle / "manifest.json").read_text()).items() if k != "checksum"})
        ),
        "does not agree with its own checksum",
    ),
    # The files
    "graph_missing": (remove("model.onnx"), "model.onnx is missing"),
    "weights_missing": (remove("model.onnx.data"), "model.onnx.data is missing"),
    "tokenizer_missing": (remove("tokenizer.json"), "tokenizer.json is missing"),
    "accuracy_missing": (remove("accuracy.json"), "accuracy.json is missing"),
    "graph_emptied": (overwrite("model.onnx", b""), "model.onnx has 0 bytes, the manifest says 5"),
    "weights_cut_short": (
        lambda bundle: os.truncate(bundle / "model.onnx.data", 699),
        "model.onnx.data has 699 bytes, the manifest says 700: it is cut short or changed",
    ),
    "weights_grown": (
        lambda bundle: os.truncate(bundle / "model.onnx.data", 701),
        "model.onnx.data has 701 bytes",
    ),
    "graph_first_bit": (flip("model.onnx", 0), "model.onnx does not have the hash"),
    "weights_middle_bit": (flip("model.onnx.data", 350), "model.onnx.data does not have the hash"),
    "weights_last_bit": (flip("model.onnx.data", 699), "model.onnx.data does not have the hash"),
    "weights_zeroed": (overwrite("model.onnx.data", bytes(700)), "model.onnx.data does not have the hash"),
    "template_changed": (
        lambda bundle: (bundle / "chat_template.jinja").write_text("{{ evil    }}"),
        "chat_template.jinja",
    ),
    "references_changed": (flip("accuracy.json", 60), "accuracy.json does not have the hash"),
    "files_swapped": (swap_files, "json has"),
    "weights_replaced_by_folder": (replace_by("model.onnx.data", Path.mkdir), "is not a regular file"),
    "weights_replaced_by_pipe": (replace_by("model.onnx.data", os.mkfifo), "is not a regular file"),
    "link_to_outside": (escape_through_link, "model.onnx.data is a symbolic link out of the bundle"),
    "folder_link_to_outside": (move_into_linked_folder, "inner/data is a symbolic link out of the bundle"),
    "dangling_link": (replace_by("model.onnx.data", lambda path: path.symlink_to("gone")), "is missing"),
    "link_to_itself": (replace_by("model.onnx.data", lambda path: path.symlink_to(path.name)), "cannot be reached"),
    "template_slipped_in": (
        put("files/chat_template.jinja", ...),
        "chat_template.jinja is not listed in the manifest",
    ),
    "linked_checkpoint_missing": (
        put("linked_files", {"w.st": {"bytes": 5, "header_sha256": "0" * 64, "sampled_sha256": "0" * 64}}),
        "w.st is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_bundle_is_refused(tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    bundle = write_bundle(tmp_path / "out")
    damage(bundle)
    with pytest.raises(BundleError, match=reason) as refusal:
        Bundle.open(bundle)
    message = str(refusal.value)
    assert "\n" not in message
    assert str(bundle) in message
    assert "; " in message or "update qwenforge" in message, "the sentence says what to do"


@pytest.mark.parametrize("level", ["quick", "full"])
def test_whole_bundle_opens(tmp_path: Path, level: Any) -> None:
    out = write_bundle(tmp_path / "out")
    (out / "notes.txt").write_text("a file that means nothing to us")
    assert Bundle.open(str(out), verify=level).manifest.weights == "copy"


def test_copied_and_moved_bundle_opens(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    shutil.copytree(out, tmp_path / "copy")
    shutil.move(out, tmp_path / "moved")
    assert Bundle.open(tmp_path / "copy").manifest == Bundle.open(tmp_path / "moved").manifest


def test_link_inside_the_bundle_is_accepted(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    shutil.move(out / "model.onnx.data", out / "shared.data")
    (out / "model.onnx.data").symlink_to("shared.data")
    assert Bundle.open(out).path == out


@pytest.mark.parametrize(("make", "reason"), [(Path.touch, "is a file, not a bundle"), (str, "does not exist")])
def test_what_is_no_folder_is_refused(tmp_path: Path, make: Callable[[Path], Any], reason: str) -> None:
    make(tmp_path / "out")
    with pytest.raises(BundleError, match=reason):
        Bundle.open(tmp_path / "out")


@pytest.mark.parametrize(
    "at", [0, 1 << 20, QUICK_LIMIT // 2, QUICK_LIMIT + 99], ids=["head", "block", "middle", "tail"]
)
def test_quick_check_of_a_large_file_notices_a_change_in_its_samples(tmp_path: Path, at: int) -> None:
    bundle = write_bundle(tmp_path / "out", data=bytes(QUICK_LIMIT + 100))
    Bundle.open(bundle)
    damaged = bundle / "model.onnx.data"
    with damaged.open("r+b") as file:
        file.seek(at)
        file.write(b"x" * min(300_000, QUICK_LIMIT + 100 - at))
    with pytest.raises(BundleError, match=r"model\.onnx\.data does not have the hash"):
        Bundle.open(bundle)


def test_full_check_notices_what_the_samples_miss(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "out", data=bytes(2 * QUICK_LIMIT))
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.seek(2 * QUICK_LIMIT * 32 // 64 + 100_000)  # past the block of 64 KiB at the middle
        file.write(b"x")
    Bundle.open(bundle)
    with pytest.raises(BundleError, match=r"model\.onnx\.data does not have the hash"):
        Bundle.open(bundle, verify="full")


def test_sampled_hash_depends_on_the_size_alone_for_zeros(tmp_path: Path) -> None:
    hashes = set()
    for size in (0, 1, 65_536, 1 << 20, (1 << 20) + 1):
        (tmp_path / "f").write_bytes(bytes(size))
        hashes.add(sampled_sha256(tmp_path / "f"))
    assert len(hashes) == 5


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 8, (5).to_bytes(8, "little") + b"{}"])
def test_header_hash_survives_lying_headers(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    assert len(header_sha256(tmp_path / "f")) == 64


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("generation_config.json", "[1]", "generation_config.json is not a JSON object"),
        ("generation_config.json", "{", "generation_config.json is not valid JSON"),
        ("accuracy.json", '{"references": [{}]}', "references of an unknown form"),
        ("accuracy.json", '{"references": 3}', "references of an unknown form"),
    ],
)
def test_part_of_an_unknown_form_is_refused_when_read(tmp_path: Path, name: str, text: str, reason: str) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        writer.add_text("model.onnx", "model")
        writer.add_text(name, text)
        bundle = Bundle.open(writer.commit(bundle_facts()))
    with pytest.raises(BundleError, match=reason):
        _ = (bundle.generation_config, bundle.references)


def test_facts_refuse_fields_nobody_defined() -> None:
    with pytest.raises(ValueError, match="surprise"):
        bundle_facts(surprise=1)
    with pytest.raises(ValueError, match="names its method"):
        Verification(performed=False, method="whole-model")
    with pytest.raises(ValueError, match="frozen"):
        bundle_facts().dtype = "int8"


def test_reference_logits_round_trip_and_compare() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    reference = ReferenceLogits.from_logits([3, 1, 4], [1, 2], logits, greedy_tokens=[5], top=8)
    assert ReferenceLogits.from_json(json.loads(json.dumps(reference.to_json()))) == reference
    assert reference.max_abs_error(logits) == 0.0
    assert reference.top_ids[0][0] == int(logits[0].argmax())
    exact = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    np.testing.assert_allclose(reference.logsumexp, exact, rtol=1e-12)
    moved = logits.copy()
    moved[1, reference.top_ids[1][3]] += np.float32(0.5)
    assert reference.max_abs_error(moved) == pytest.approx(0.5, abs=1e-6)
    moved[0, reference.top_ids[0][0]] = np.nan
    assert reference.max_abs_error(moved) == np.inf


def test_reference_logits_refuse_what_does_not_fit() -> None:
    good = reference_logits()
    with pytest.raises(ValueError, match="one row for each of 3"):
        ReferenceLogits.from_logits([1, 2, 3], [0, 1, 2], np.zeros((2, 40), np.float32))
    with pytest.raises(ValueError, match="finite"):
        ReferenceLogits.from_logits([1], [0], np.full((1, 40), np.nan, np.float32))
    with pytest.raises(ValueError, match="do not all lie"):
        ReferenceLogits.from_logits([1], [1], np.zeros((1, 40), np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        good.max_abs_error(np.zeros((2, 3), np.float32))


def test_root_package_does_not_import_the_manifest() -> None:
    code = "import qwenforge, sys; print('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
