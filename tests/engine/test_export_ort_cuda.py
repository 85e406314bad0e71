"""Exports for ort-cuda: verified without a GPU, recorded; refused where the lowering is wrong or a kernel missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from qwenforge import lowering_choice
from qwenforge.bundle import Bundle
from qwenforge.engine.bundle_summary import summarize_bundle
from qwenforge.engine.export import export_checkpoint
from qwenforge.errors import UnsupportedError, VerificationError
from qwenforge.graph_passes.lower import expert_packing, ort_cuda_ops
from support.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts renormalized, norms of the heads of q and k."""
    return make_checkpoint(tmp_path_factory.mktemp("ort-cuda") / "checkpoint", "qwen3_moe", dtype="bfloat16")


def _export(checkpoint: Path, output: Path, **wishes: Any) -> Any:
    dtype, verify = wishes.pop("dtype", None), wishes.pop("verify_result", True)
    choice = lowering_choice.choose("ort-cuda", **wishes)
    return export_checkpoint(
        checkpoint, output, target="ort-cuda", dtype=dtype, max_length=64, choice=choice, verify_result=verify
    )


@pytest.mark.parametrize(
    ("wishes", "attention", "basis"),
    [
        ({"device": "h200"}, "native", "estimate, not measured"),
        ({"attention": "plugin", "experts": "plugin", "dtype": "fp16"}, "plugin", "asked for"),
    ],
)
def test_bundle_is_verified_and_says_what_its_graph_is_made_of(
    checkpoint: Path, tmp_path: Path, wishes: dict[str, Any], attention: str, basis: str
) -> None:
    report = _export(checkpoint, tmp_path / "bundle", **wishes)
    assert report.verification.graph_error < 2e-4 and report.lowering is None
    manifest = Bundle.open(tmp_path / "bundle", verify="full").manifest
    record = manifest.ort_cuda
    assert record == report.ort_cuda and record is not None and manifest.lowering is None
    assert (record.attention, record.moe, record.basis) == (attention, "plugin", basis)
    assert manifest.dtype == wishes.get("dtype", "bf16") and manifest.limits.max_batch is None
    caches = [spec for spec in manifest.inputs if spec.name.startswith("past_key_values.")]
    assert {(spec.dtype, spec.shape[2]) for spec in caches} == {
        ("float16" if manifest.dtype == "fp16" else "bfloat16", "capacity")
    }
    lines = dict(dict(summarize_bundle(manifest))["lowering"])
    assert lines["attention"] == attention and lines["chosen by"] == basis
    assert lines["device"] == ("any; chosen for h200 (SM 90)" if "device" in wishes else "any")


@pytest.mark.parametrize(
    "patch",
    [
        mock.patch.object(expert_packing, "ROWS", 4),
        mock.patch.object(ort_cuda_ops, "float_attribute", return_value=1e-2),
    ],
    ids=["experts packed in groups of 4", "norms of the heads with another epsilon"],
)
def test_wrong_lowering_is_not_written(checkpoint: Path, tmp_path: Path, patch: Any) -> None:
    with patch, pytest.raises(VerificationError, match=r"differs from transformers.*no bundle was written"):
        _export(checkpoint, tmp_path / "bundle", attention="plugin")
    assert list(tmp_path.iterdir()) == []


def test_head_size_that_no_kernel_takes_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    odd = make_checkpoint(tmp_path / "checkpoint", "qwen2", dtype="bfloat16", **sizes)
    with pytest.raises(UnsupportedError, match=r"no CUDA kernel for GroupedQueryAttention .*; export for another"):
        _export(odd, tmp_path / "bundle", verify_result=False)
    with pytest.raises(UnsupportedError, match="head_size is 12, no multiple of 8"):
        _export(odd, tmp_path / "bundle", verify_result=False, attention="plugin")
    assert not (tmp_path / "bundle").exists()
