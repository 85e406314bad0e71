"""Whose kernels a bundle's graph is made of: recorded, read back, and absent from bundles of older versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenforge.bundle import Bundle
from qwenforge.errors import BundleError
from qwenforge.manifest import MANIFEST_NAME, OrtCpuRecord, checksum
from support.bundle_builder import write_bundle


def _changed(bundle: Path, **changes: object) -> Path:
    """``bundle`` with other fields in its manifest and the checksum over them; None takes a field out."""
    path = bundle / MANIFEST_NAME
    fields = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in fields.items() if name != "checksum" and (value or name not in changes)}
    path.write_text(json.dumps({**kept, "checksum": checksum(kept)}))
    return bundle


def test_kernels_are_read_back(tmp_path: Path) -> None:
    record = OrtCpuRecord(kernels="qwenforge", basis="avx2 here", cache="fp16")
    assert Bundle.open(write_bundle(tmp_path / "bundle", ort_cpu=record)).manifest.ort_cpu == record


def test_bundle_of_an_older_version_has_none(tmp_path: Path) -> None:
    """Its manifest has no such field at all."""
    bundle = _changed(write_bundle(tmp_path / "bundle"), ort_cpu=None)
    assert "ort_cpu" not in json.loads((bundle / MANIFEST_NAME).read_text())
    assert Bundle.open(bundle).manifest.ort_cpu is None


def test_record_of_an_older_version_is_of_fp32_caches(tmp_path: Path) -> None:
    bundle = _changed(write_bundle(tmp_path / "bundle"), ort_cpu={"kernels": "qwenforge", "basis": "avx2 here"})
    record = Bundle.open(bundle).manifest.ort_cpu
    assert record is not None and record.cache == "fp32"


def test_unknown_kernels_are_refused(tmp_path: Path) -> None:
    bundle = _changed(write_bundle(tmp_path / "bundle"), ort_cpu={"kernels": "mine", "basis": "asked for"})
    with pytest.raises(BundleError, match=r"manifest\.json: ort_cpu\.kernels"):
        Bundle.open(bundle)
