"""Whose kernels compute an ort-cpu bundle's quantized weights: the choice, what is written, and what then runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import load, names
from qwenforge.bundle import Bundle
from qwenforge.engine import cpu_kernels, cpu_library, quantized_export, verification
from qwenforge.engine import export as export_module
from qwenforge.engine.bundle_summary import summarize_bundle
from qwenforge.engine.cpu_kernels import choose_kernels
from qwenforge.engine.cpu_library import CpuLibrary
from qwenforge.engine.export import ExportReport, export_checkpoint
from qwenforge.engine.inspection import Inspection, inspect_model, read_model
from qwenforge.engine.ort_cpu_graphs import CpuGraphs, lower_quantized
from qwenforge.engine.quantization_request import quantization_request
from qwenforge.engine.static_scales import ScalesRequest
from qwenforge.errors import UnsupportedError, UserError, VerificationError
from qwenforge.manifest import Kernels
from support.prequantized_checkpoints import write_quantized
from support.prequantized_styles import STYLES
from support.source_tree import ROOT
from support.tolerances import INT8_ACTIVATIONS

CHECKPOINTS = ROOT / "examples/checkpoints"


def installed(monkeypatch: pytest.MonkeyPatch, instruction_set: str | None) -> None:
    """Let this installation have a library that found ``instruction_set``, or none."""
    found = None if instruction_set is None else CpuLibrary(Path("/lib.so"), "0", instruction_set)
    monkeypatch.setattr(cpu_kernels, "cpu_library", lambda: found)


@pytest.mark.parametrize(
    ("instruction_set", "kernels", "basis"),
    [
        ("avx512-vnni", "qwenforge", "avx512-vnni here"),
        ("avx2", "qwenforge", "avx2 here"),
        ("baseline", "onnxruntime", "written for AVX-512 VNNI and AVX2, and baseline is all there is here"),
        (None, "onnxruntime", "libqwenforge_cpu.so is not installed: there was no C++ compiler then"),
    ],
)
def test_default_is_ours_where_they_are_made_for_the_processor(
    monkeypatch: pytest.MonkeyPatch, instruction_set: str | None, kernels: str, basis: str
) -> None:
    installed(monkeypatch, instruction_set)
    record = choose_kernels(None, target="ort-cpu", dtype="fp32", weight_only=True)
    assert record is not None and record.kernels == kernels and basis in record.basis


@pytest.mark.parametrize(
    ("options", "basis"),
    [({"dtype": "fp16"}, "do not go with --dtype fp16"), ({"weights": "link"}, "do not go with --weights link")],
)
def test_what_ours_cannot_do_is_left_to_onnxruntime_and_refused_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], basis: str
) -> None:
    installed(monkeypatch, "avx2")
    arguments: dict[str, Any] = {"target": "ort-cpu", "dtype": "fp32", "weight_only": True, **options}
    record = choose_kernels(None, **arguments)
    assert record is not None and record.kernels == "onnxruntime" and basis in record.basis
    with pytest.raises(UnsupportedError, match="--kernels qwenforge does not go with --"):
        choose_kernels("qwenforge", **arguments)


@pytest.mark.parametrize("asked", ["qwenforge", "onnxruntime"])
@pytest.mark.parametrize(("target", "weight_only"), [("ort-cpu", False), ("portable", True), ("ort-cuda", True)])
def test_nothing_to_choose_is_no_record_and_refused_when_asked_for(
    target: str, weight_only: bool, asked: Kernels
) -> None:
    assert choose_kernels(None, target=target, dtype="fp32", weight_only=weight_only) is None
    with pytest.raises(UnsupportedError, match="add --quantize int4-weight-only or int8-weight-only, or leave"):
        choose_kernels(asked, target=target, dtype="fp32", weight_only=weight_only)


def test_ours_asked_for_and_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu_library.VARIABLE, raising=False)
    monkeypatch.setattr(cpu_library, "_PLACES", ())
    with pytest.raises(UserError, match=r"--kernels qwenforge asks .* reinstall qwenforge where there is one"):
        choose_kernels("qwenforge", target="ort-cpu", dtype="fp32", weight_only=True)


def exported(
    folder: Path, kernels: Kernels | None, name: str = "tiny-qwen2", recipe: str = "int4-weight-only"
) -> ExportReport:
    request = quantization_request(recipe, calibration_rows=4)
    return export_checkpoint(
        CHECKPOINTS / name, folder, quantization=request, kernels=kernels, max_length=256, verify_result=False
    )


def domains(bundle: Path) -> set[str]:
    return {node.domain for node in ir.load(bundle / "model.onnx").graph}


def inspected(bundle: Path) -> Inspection:
    return inspect_model(read_model(bundle / "model.onnx"), "model")


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-qwen2-moe"])
def test_bundle_of_our_kernels_is_judged_says_so_and_runs_like_the_other(name: str, tmp_path: Path) -> None:
    ours, theirs = (exported(tmp_path / kernels, kernels, name) for kernels in ("qwenforge", "onnxruntime"))
    assert ours.quantization is not None and list(ours.quantization.run.graphs) == ["model.onnx"]
    for report, kernels in ((ours, "qwenforge"), (theirs, "onnxruntime")):
        manifest = Bundle.open(report.bundle, verify="full").manifest
        assert manifest.ort_cpu == report.ort_cpu
        assert report.ort_cpu is not None and report.ort_cpu.kernels == kernels
        assert report.ort_cpu.cache == ("fp16" if kernels == "qwenforge" else "fp32")
        assert (names.CPU_DOMAIN in domains(report.bundle)) == (kernels == "qwenforge")
        assert (report.bundle / "prefill.onnx").exists() == (kernels == "onnxruntime")
    shown = dict(dict(summarize_bundle(Bundle.open(ours.bundle).manifest))["lowering"])
    assert shown["kernels"] == "qwenforge's (libqwenforge_cpu.so)" and shown["cache"] == "fp16"
    ours_found, theirs_found = (inspected(report.bundle) for report in (ours, theirs))
    assert ours_found.fused["attention"] == theirs_found.fused["attention"] == 3
    assert ours_found.fused["mixture of experts"] == theirs_found.fused["mixture of experts"]
    assert [layer.attention for layer in ours_found.layers] == ["CachedAttention"] * 3
    tokens = list(range(3, 40))
    (found,), (expected,) = (load(report.bundle, threads=2).logits([tokens]) for report in (ours, theirs))
    assert np.linalg.norm(found - expected) < INT8_ACTIVATIONS * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("name", "style", "whole"),
    [
        ("tiny-qwen2", "gptq-int4-group128", True),
        ("tiny-qwen2", "awq-group32", False),
        ("tiny-qwen2-moe", "gptq-int8-whole-row", True),
    ],
)
def test_checkpoint_that_is_quantized_already_is_verified_with_our_kernels(
    name: str, style: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "fits_whole", lambda *_: whole)
    folder = write_quantized(CHECKPOINTS / name, tmp_path / "q", STYLES[style]())
    report = export_checkpoint(folder, tmp_path / "bundle", max_length=256, kernels="qwenforge")
    found = report.verification
    assert found is not None and found.method == ("whole-model" if whole else "layer-by-layer")
    assert found.graph_error < 2e-4 < found.max_abs_error, "exact by kernels that round nothing, and ours round"
    assert not list(report.bundle.glob(".verify*"))
    assert report.ort_cpu is not None and (report.ort_cpu.kernels, report.ort_cpu.cache) == ("qwenforge", "fp16")
    assert names.CPU_DOMAIN in domains(report.bundle)


def test_our_kernels_that_compute_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_quantized(CHECKPOINTS / "tiny-qwen2", tmp_path / "q", STYLES["gptq-int4-group128"]())

    def spoiled(*arguments: Any, **options: Any) -> CpuGraphs:
        graphs = lower_quantized(*arguments, **options)
        scales = next(node for node in graphs.decode.graph if node.op_type == "QuantizedLinear").inputs[2]
        assert scales is not None and scales.const_value is not None
        scales.const_value = ir.tensor(np.float32(1.2) * scales.const_value.numpy(), name=scales.name)
        return graphs

    monkeypatch.setattr(export_module, "lower_quantized", spoiled)
    with pytest.raises(VerificationError, match="model, computed by qwenforge's kernels, differs from transformers"):
        export_checkpoint(folder, tmp_path / "bundle", max_length=256, kernels="qwenforge")
    assert not (tmp_path / "bundle").exists()


def test_static_scales_of_activations_are_not_for_our_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_quantized(CHECKPOINTS / "tiny-qwen2", tmp_path / "q", STYLES["compressed-w8a8-static"]())
    with pytest.raises(UnsupportedError, match="add --static-scales ignore, or leave --kernels out"):
        export_checkpoint(folder, tmp_path / "bundle", max_length=256, kernels="qwenforge", verify_result=False)
    installed(monkeypatch, "avx2")  # the default is ours, until the scales are known
    with pytest.raises(UnsupportedError, match="add --static-scales ignore, or leave --cache out"):
        export_checkpoint(folder, tmp_path / "bundle", max_length=256, cache="fp32", verify_result=False)
    anything = ScalesRequest(budget="kl=99,ppl=1e9,top1=0")  # the scales are random
    applied = export_checkpoint(
        folder, tmp_path / "bundle", max_length=256, verify_result=False, static_scales=anything
    )
    assert applied.ort_cpu is None and names.CPU_DOMAIN not in domains(applied.bundle)


def test_bundle_of_our_kernels_is_judged_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_export, "fits_whole", lambda *_: False)
    run = exported(tmp_path / "bundle", "qwenforge").quantization
    assert run is not None and run.run.method == "layer-by-layer"


def test_bundle_of_our_kernels_without_the_library_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported(tmp_path / "bundle", "qwenforge").bundle
    monkeypatch.setattr(cpu_library, "_PLACES", ())
    monkeypatch.delenv(cpu_library.VARIABLE, raising=False)
    with pytest.raises(UserError, match="the bundle was exported with qwenforge's CPU kernels, and this installation"):
        load(bundle)


def test_path_of_the_library_can_be_given_to_the_bundle_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu_library.find_cpu_library().path
    bundle = exported(tmp_path / "bundle", "qwenforge").bundle
    monkeypatch.setattr(cpu_library, "_PLACES", ())
    monkeypatch.delenv(cpu_library.VARIABLE, raising=False)
    model = load(bundle, plugin_library=library, threads=2)
    assert len(model.generate([[5, 6, 7]], max_new_tokens=2, ignore_eos=True).sequences[0].tokens) == 2
    with pytest.raises(UserError, match="there is no plugin library at"):
        load(bundle, plugin_library=tmp_path / "absent.so")
