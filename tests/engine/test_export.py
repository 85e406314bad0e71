"""An export writes a verified bundle that says what it is, or nothing, and never touches what was there before."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.bundle import Bundle
from qwenforge.engine import export as export_module
from qwenforge.engine.export import DEFAULT_MAX_LENGTH, export_checkpoint
from qwenforge.errors import BundleError, UnsupportedError, UserError, VerificationError
from support.planted_faults import attribute


def listing(folder: Path) -> dict[str, str]:
    """Every file under ``folder`` with its hash."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def plant_wrong_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the exporter itself lower to a wrong graph."""
    lower = export_module.lower

    def wrong(*args: Any, **options: Any) -> ir.Model:
        model = lower(*args, **options)
        attribute(("RMSNormalization", "SkipSimplifiedLayerNormalization"), "epsilon", 1e-3)(model)
        return model

    monkeypatch.setattr(export_module, "lower", wrong)


@pytest.fixture
def checkpoint(exports: Any) -> Path:
    """The dense checkpoint that the shared exports were made of."""
    folder: Path = exports("qwen2", "ort-cpu", "fp32").checkpoint.folder
    return folder


@pytest.fixture
def old(checkpoint: Path, tmp_path: Path) -> Path:
    """An older bundle, alone in its folder."""
    return export_checkpoint(checkpoint, tmp_path / "place" / "bundle", max_length=32, verify_result=False).bundle


def test_manifest_says_what_the_bundle_is(exports: Any) -> None:
    export = exports("qwen2", "ort-cpu", "fp32")
    manifest = Bundle.open(export.bundle, verify="full").manifest
    assert (manifest.target, manifest.dtype, manifest.weights) == ("ort-cpu", "fp32", "copy")
    assert manifest.source.path_name == "qwen2" == manifest.source.model_type
    assert manifest.source.config == json.loads((export.checkpoint.folder / "config.json").read_text())
    assert manifest.source.dtype == "float32"
    assert manifest.source.fingerprint == export.checkpoint.fingerprint()
    assert (manifest.limits.max_length, manifest.limits.max_batch) == (256, None)
    assert (manifest.eos_token_ids, manifest.bos_token_id, manifest.pad_token_id) == ((257, 256), 256, 256)
    assert (manifest.model.num_hidden_layers, manifest.model.head_dim, manifest.model.vocab_size) == (2, 16, 320)
    assert manifest.model.num_experts is None
    tools = ("onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch", "transformers")
    assert manifest.tool_versions == {name: metadata.version(name) for name in tools}


@pytest.mark.parametrize(
    ("kind", "target", "dtype", "cache"),
    [
        ("qwen2", "ort-cpu", "fp32", "float32"),
        ("qwen2", "ort-cpu", "fp16", "float16"),
        ("mixed", "portable", "bf16", "bfloat16"),
    ],
)
def test_manifest_states_inputs_and_outputs(exports: Any, kind: Any, target: str, dtype: str, cache: str) -> None:
    manifest = Bundle.open(exports(kind, target, dtype).bundle).manifest
    inputs = {spec.name: (spec.dtype, spec.shape) for spec in manifest.inputs}
    outputs = {spec.name: (spec.dtype, spec.shape) for spec in manifest.outputs}
    assert inputs["input_ids"] == inputs["position_ids"] == ("int64", ("batch", "sequence"))
    assert inputs["cache_position"] == ("int64", ("batch",))
    assert inputs["logits_index"] == ("int64", ("batch", "logits_count"))
    assert outputs["logits"] == ("float32", ("batch", "logits_count", 320))
    for layer in range(2):
        for part in ("key", "value"):
            expected = (cache, ("batch", 2, "capacity", 16))
            assert inputs[f"past_key_values.{layer}.{part}"] == outputs[f"present.{layer}.{part}"] == expected
    assert (len(inputs), len(outputs)) == (8, 5)


def test_hashes_are_those_of_the_files(exports: Any) -> None:
    for kind, target, dtype in (("qwen2", "ort-cpu", "fp32"), ("mixed", "portable", "bf16")):
        export = exports(kind, target, dtype)
        files = Bundle.open(export.bundle).manifest.files
        stated = {name: record.sha256 for name, record in files.items()}
        assert stated == {name: sha for name, sha in listing(export.bundle).items() if name != "manifest.json"}
        assert {"model.onnx", "model.onnx.data", "tokenizer.json", "accuracy.json", "layer_before.json"} <= set(stated)
        assert files["model.onnx.data"].bytes == export.report.data_bytes


@pytest.mark.parametrize(
    ("kind", "target", "dtype", "reference"),
    [
        ("qwen2", "ort-cpu", "fp32", "transformers fp32"),
        ("qwen2", "ort-cpu", "fp16", "transformers fp32, weights rounded to fp16"),
        ("mixed", "portable", "bf16", "transformers fp32, weights rounded to bf16"),
    ],
)
def test_verification_is_recorded(exports: Any, kind: Any, target: str, dtype: str, reference: str) -> None:
    export = exports(kind, target, dtype)
    bundle, report = Bundle.open(export.bundle), export.report.verification
    stated = bundle.manifest.verification
    assert (stated.performed, stated.method, stated.reference) == (True, "whole-model", reference)
    assert (stated.prompts, stated.new_tokens, stated.greedy_match) == (8, 64, report.near_ties == 0)
    assert (stated.max_abs_error, stated.bound, stated.kl) == (report.max_abs_error, report.bound, report.max_kl)
    assert 0 < report.max_abs_error < report.bound
    assert bundle.accuracy["reference"] == reference
    assert bundle.accuracy["max_abs_error_in_fp32"] == report.graph_error
    assert len(bundle.references) == 8
    for kept, (prompt, logits) in zip(bundle.references, report.references, strict=True):
        assert list(kept.token_ids) == prompt
        assert kept.max_abs_error(np.asarray(logits)[None]) == 0


def test_unverified_export_says_so(old: Path) -> None:
    bundle = Bundle.open(old)
    assert bundle.manifest.verification.model_dump(exclude_none=True) == {"performed": False}
    assert bundle.accuracy == {"verified": False, "references": []}
    assert bundle.references == ()


def test_tokenizer_and_generation_config_travel_along(exports: Any) -> None:
    export = exports("qwen2", "ort-cpu", "fp32")
    source = listing(export.checkpoint.folder)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(source)
    for name in export.checkpoint.tokenizer_files:
        assert listing(export.bundle)[name] == source[name]
    stored = json.loads((export.checkpoint.folder / "generation_config.json").read_text())
    assert Bundle.open(export.bundle).generation_config == stored


def test_progress_tells_every_stage_in_order(checkpoint: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    report = export_checkpoint(checkpoint, tmp_path / "bundle", progress=lambda what, done: told.append((what, done)))
    stages = [
        "read checkpoint",
        "trace",
        "fuse",
        "instantiate",
        "lower",
        "write weights",
        "verify against transformers",
    ]
    stages += ["finish"]
    assert list(report.seconds) == stages
    assert [what for what, _ in told if what in report.seconds] == stages
    assert told[-1][0] == "done"
    assert all(0 <= done <= 1 for _, done in told)
    assert {"write weights: lm_head.weight.transposed", "verify: decoding"} <= {what for what, _ in told}


def test_failed_verification_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_wrong_epsilon(monkeypatch)
    with pytest.raises(VerificationError, match=r"logits by .* no bundle was written"):
        export_checkpoint(checkpoint, tmp_path / "place" / "bundle")
    assert list((tmp_path / "place").iterdir()) == []


def test_failed_verification_leaves_the_older_bundle(
    checkpoint: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(old.parent)
    plant_wrong_epsilon(monkeypatch)
    with pytest.raises(VerificationError):
        export_checkpoint(checkpoint, old)
    assert listing(old.parent) == before
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


def test_export_replaces_the_older_bundle(checkpoint: Path, old: Path) -> None:
    export_checkpoint(checkpoint, old, max_length=64, max_batch=3, verify_result=False)
    limits = Bundle.open(old).manifest.limits
    assert (limits.max_length, limits.max_batch) == (64, 3)
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed")
@pytest.mark.parametrize("stage", ["fuse", "write weights: lm_head.weight.transposed", "verify against", "finish"])
def test_killed_export_leaves_the_older_bundle(checkpoint: Path, old: Path, stage: str) -> None:
    before = listing(old)

    def die(what: str, _: float) -> None:
        if what.startswith(stage):
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        signal.alarm(60)
        export_checkpoint(checkpoint, old, verify_result=stage != "finish", progress=die)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert listing(old) == before
    assert Bundle.open(old, verify="full").manifest.limits.max_length == 32
    leftover = [path for path in old.parent.iterdir() if path != old]
    assert [path.name.split("-")[0] for path in leftover] == [".bundle.partial"]
    export_checkpoint(checkpoint, old, max_length=48, verify_result=False)
    assert [path.name for path in old.parent.iterdir()] == ["bundle"], "the next export cleans up"
    assert Bundle.open(old).manifest.limits.max_length == 48


def test_linked_weights_refer_to_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    report = export_checkpoint(checkpoint, tmp_path / "bundle", weights="link")
    bundle = Bundle.open(report.bundle, verify="full")
    shard = report.bundle / "weights" / "model.safetensors"
    assert shard.samefile(checkpoint / "model.safetensors")
    assert list(bundle.manifest.linked_files) == ["weights/model.safetensors"]
    assert bundle.manifest.weights == "link"
    assert bundle.manifest.session_options == {"session.disable_prepacking": "1"}
    assert report.linked_bytes > 5 * report.data_bytes
    assert report.verification is not None and report.verification.max_abs_error < report.verification.bound


def test_linked_weights_need_the_dtype_as_stored(exports: Any, old: Path) -> None:
    checkpoint, before = exports("qwen2", "ort-cpu", "fp16").checkpoint.folder, listing(old.parent)
    with pytest.raises(UnsupportedError, match=r"Use --weights copy, or choose --dtype as stored"):
        export_checkpoint(checkpoint, old, dtype="fp16", weights="link")
    assert listing(old.parent) == before
    assert sorted(path.name for path in old.parent.iterdir()) == ["bundle"]


def test_linked_weights_on_another_disk_are_one_sentence(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match=r"cannot hard-link .*; put the bundle on the checkpoint's disk or export"):
        export_checkpoint(checkpoint, tmp_path / "place" / "bundle", weights="link")
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 15}, r"--max-length is 15; a context needs at least 16 tokens"),
        ({"max_length": 257}, r"--max-length 257 is beyond the model's 256 positions"),
        ({"weights": "symlink"}, r"--weights is copy or link, not symlink"),
        ({"dtype": "bf16"}, r"target ort-cpu does not support dtype bf16"),
        ({"target": "ort-cuda", "dtype": "fp32"}, r"target ort-cuda does not support dtype fp32: .*choose bf16"),
        (
            {"target": "ort-cuda", "dtype": "int4"},
            r"--dtype int4 .*quantize with --quantize int4-weight-only.*choose bf16 or fp16",
        ),
        ({"target": "ort-cuda", "weights": "link"}, r"--weights link .*ort-cuda, which packs the weights"),
        ({"target": "tensorrt"}, r"--target tensorrt needs --device, one of a100, "),
        (
            {"target": "tensorrt-rtx", "dtype": "fp32"},
            r"target tensorrt-rtx does not support dtype fp32: .*choose bf16",
        ),
        ({"target": "tensorrt-rtx", "weights": "link"}, r"--weights link .*tensorrt-rtx"),
    ],
)
def test_impossible_wish_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, message: str
) -> None:
    monkeypatch.setattr(export_module, "trace", None)
    with pytest.raises(UserError, match=message):
        export_checkpoint(checkpoint, tmp_path / "place" / "bundle", **options)
    assert list(tmp_path.iterdir()) == []


def test_shortest_context_is_verified_too(checkpoint: Path, tmp_path: Path) -> None:
    report = export_checkpoint(checkpoint, tmp_path / "bundle", max_length=16)
    assert report.verification is not None and report.verification.new_tokens == 4
    assert Bundle.open(report.bundle).manifest.limits.max_length == 16


def test_longest_context_is_limited_unless_asked_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert DEFAULT_MAX_LENGTH == 32768
    monkeypatch.setattr(export_module, "DEFAULT_MAX_LENGTH", 100)
    for asked, expected in ((None, 100), (256, 256)):
        report = export_checkpoint(checkpoint, tmp_path / "bundle", max_length=asked, verify_result=False)
        assert Bundle.open(report.bundle).manifest.limits.max_length == expected


def test_folder_that_is_no_bundle_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    monkeypatch.setattr(export_module, "trace", None)
    for target in (out, out / "thesis.txt", checkpoint):
        with pytest.raises(BundleError, match=r"is not a bundle; choose another path|is a file; choose another path"):
            export_checkpoint(checkpoint, target)
    assert listing(tmp_path) == {"thesis/thesis.txt": hashlib.sha256(b"mine").hexdigest()}
