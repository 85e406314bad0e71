"""The second graph of a bundle: listed, found, and absent from bundles that were written before there was one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenforge.bundle import Bundle, BundleWriter
from qwenforge.errors import BundleError
from qwenforge.manifest import MANIFEST_NAME, PREFILL_NAME, PrefillRecord, checksum
from support.bundle_builder import bundle_facts, write_bundle

RECORD = PrefillRecord(file=PREFILL_NAME, minimum_tokens=16)


def _bundle(out: Path) -> Path:
    with BundleWriter(out) as writer:
        for name in ("model.onnx", "model.onnx.data", PREFILL_NAME):
            (writer.directory / name).write_bytes(name.encode())
        return writer.commit(bundle_facts(prefill=RECORD))


def test_prefill_graph_is_found_by_the_manifest(tmp_path: Path) -> None:
    bundle = Bundle.open(_bundle(tmp_path / "bundle"))
    assert bundle.prefill_path == tmp_path / "bundle" / PREFILL_NAME and bundle.manifest.prefill == RECORD


def test_bundle_of_an_older_version_has_one_graph(tmp_path: Path) -> None:
    """Its manifest has no such field at all."""
    path = write_bundle(tmp_path / "bundle") / MANIFEST_NAME
    fields = json.loads(path.read_text())
    del fields["prefill"], fields["checksum"]
    path.write_text(json.dumps({**fields, "checksum": checksum(fields)}))
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.prefill_path is None


def test_prefill_graph_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = _bundle(tmp_path / "bundle")
    (folder / PREFILL_NAME).unlink()
    with pytest.raises(BundleError, match=r"prefill\.onnx is missing"):
        Bundle.open(folder)


def test_prefill_graph_that_was_slipped_in_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / PREFILL_NAME).write_bytes(b"another graph")
    with pytest.raises(BundleError, match=r"prefill\.onnx is not listed in the manifest"):
        Bundle.open(folder)


def test_record_of_a_file_that_is_not_listed_cannot_be_written(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.directory / "model.onnx").write_bytes(b"model")
        with pytest.raises(ValueError, match="does not list the prefill graph"):
            writer.commit(bundle_facts(prefill=RECORD))
