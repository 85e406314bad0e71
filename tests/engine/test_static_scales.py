"""Static scales of activations and caches in quantized checkpoints: applied, judged, recorded, or left out by name."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.bundle import Bundle
from qwenforge.calibration.budget import FP8
from qwenforge.cli.main import main
from qwenforge.engine.bundle_summary import summarize_bundle
from qwenforge.engine.export import ExportReport, export_checkpoint
from qwenforge.engine.static_scales import ScalesRequest, require_scales, usable_scales
from qwenforge.engine.window_runner import WindowRunner
from qwenforge.errors import AccuracyError, UnsupportedError, UserError
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.instantiate import instantiate
from qwenforge.exporter.trace import trace
from qwenforge.graph_passes.pipeline import optimize
from qwenforge.lowering_choice import choose
from support.cached_decoder import random_tokens
from support.prequantized_checkpoints import (
    Style,
    compressed_tensors,
    observed_input_scales,
    write_quantized,
)
from support.prequantized_reference import reference_model
from support.prequantized_styles import STYLES
from support.quantized_reference import fake_quantized
from support.tolerances import QUANTIZED_MODEL

EXAMPLES = Path(__file__).parents[2] / "examples" / "checkpoints"
TOKENS = random_tokens(24, seed=3)
ANYTHING = ScalesRequest(budget="kl=10,ppl=10,top1=0")


def _calibrated_int8() -> Style:
    """W8A8 as llm-compressor writes it, with scales that fit the activations."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = weights | {"strategy": "tensor"}
    scales = observed_input_scales(EXAMPLES / "tiny-qwen2", 127)
    return compressed_tensors("int-quantized", weights, inputs, input_scales=scales)


def _export(style: Style, model: str, folder: Path, target: str, **options: Any) -> ExportReport:
    source = write_quantized(EXAMPLES / model, folder / "q", style)
    return export_checkpoint(source, folder / "bundle", target=target, max_length=256, **options)


def _operators(bundle: Path) -> list[str]:
    return [node.op_type for node in ir.load(bundle / "model.onnx").graph]


def test_fp8_activations_are_applied_for_tensorrt_within_their_budget(tmp_path: Path) -> None:
    report = _export(STYLES["modelopt-fp8"](), "tiny-qwen2", tmp_path, "tensorrt-rtx")
    assert report.verification is not None and report.verification.token_disagreements == 0
    outcome = report.static_scales
    assert outcome is not None and outcome.applied == "fp8 inputs of 18 products or experts"
    # Of q, k and v; of o; of gate and up; of down: in each of three layers.
    assert _operators(report.bundle).count("QuantizeLinear") == 12
    (sentence,) = report.scales_left_out
    assert sentence.startswith("the checkpoint's static scales of fp8 caches are not used") and "plugin" in sentence
    bundle = Bundle.open(report.bundle, verify="full")
    record = bundle.manifest.quantization
    assert record is not None and record.cache is None and record.recipe == "checkpoint"
    assert {(each.weight, each.activation): each.sites for each in record.sites} == {
        ("fp8", "fp8"): 18,
        ("kept", None): 1,
    }
    assert record.accuracy["mean_kl"] == outcome.run.distributions.mean_kl <= record.budget["kl"] == FP8.kl
    said = bundle.read_json("accuracy.json")
    assert said["verified"] and said["static_scales"] == json.loads(json.dumps(outcome.to_json()))
    assert said["static_scales_left_out"] == [sentence]
    summary = dict(dict(summarize_bundle(bundle.manifest))["quantization"])
    assert summary["their inputs"] == "18 fp8, 1 as the model's" and summary["cache"] == "as the model's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "q"]  # no work folder is left


def test_fp8_experts_and_caches_are_applied_by_the_plugins(tmp_path: Path) -> None:
    """The random scales of the fixture cost more than the default budget allows; the graph is what counts here."""
    choice = choose("tensorrt", device="h200", attention="plugin")
    report = _export(
        STYLES["modelopt-fp8"](), "tiny-qwen2-moe", tmp_path, "tensorrt", choice=choice, static_scales=ANYTHING
    )
    assert report.scales_left_out == () and report.static_scales is not None
    record = Bundle.open(report.bundle).manifest.quantization
    assert record is not None and record.cache == "fp8"
    nodes = list(ir.load(report.bundle / "model.onnx").graph)
    experts = [node for node in nodes if node.op_type == "QwenForgeMoE"]
    attention = [node for node in nodes if node.op_type == "QwenForgeAttention"]
    assert {node.attributes["weight_type"].as_int() for node in experts} == {3} and len(experts) == 3
    assert {node.attributes["cache_type"].as_int() for node in attention} == {1} and len(attention) == 3
    # Near, but not the same: the scales did something, and nothing wrong.
    assert 1e-4 < report.static_scales.run.distributions.mean_kl < 0.05


@pytest.mark.parametrize(
    ("style", "model", "target"),
    [
        ("modelopt-fp8", "tiny-qwen2-moe", "portable"),
        ("calibrated int8", "tiny-qwen2", "ort-cpu"),
    ],
)
def test_the_bundle_computes_what_torch_does_with_the_same_scales(
    style: str, model: str, target: str, tmp_path: Path
) -> None:
    import torch

    made = _calibrated_int8() if style == "calibrated int8" else STYLES[style]()
    report = _export(made, model, tmp_path, target, dtype="fp32", static_scales=ANYTHING)
    assert report.static_scales is not None
    source = reference_model(EXAMPLES / model, tmp_path / "q")
    with torch.no_grad():
        unquantized = source(torch.tensor([TOKENS])).logits[0].numpy()
        expected = fake_quantized(source, report.static_scales.plan)(torch.tensor([TOKENS])).logits[0].numpy()
    runner = WindowRunner.from_file(report.bundle / "model.onnx", whole=True, options={})
    (ours,) = runner.logits(np.array([TOKENS], np.int64))
    assert np.linalg.norm(ours - expected) <= QUANTIZED_MODEL * np.linalg.norm(expected)
    # And the scales must have done something that this can see.
    assert np.linalg.norm(ours - expected) <= 0.2 * np.linalg.norm(ours - unquantized)
    if target == "ort-cpu":
        operators = _operators(report.bundle)  # all products but that by the tied embedding are of integers
        assert "MatMulIntegerToFloat" in operators and not {"MatMul", "MatMulNBits"} & set(operators)


def test_scales_that_miss_the_budget_leave_no_bundle_and_name_the_way_out(tmp_path: Path) -> None:
    style = STYLES["compressed-w8a8-static"]()  # random scales
    with pytest.raises(AccuracyError, match=r"int8 inputs of 18.*worst layers are model\.l.*--static-scales ignore"):
        _export(style, "tiny-qwen2", tmp_path, "ort-cpu", verify_result=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]
    report = _export(style, "tiny-qwen2", tmp_path, "ort-cpu", static_scales=ScalesRequest(apply=False))
    assert report.static_scales is None and "--static-scales ignore leaves" in report.scales_left_out[0]
    assert report.verification is not None and report.verification.token_disagreements == 0
    assert "QuantizeLinear" not in _operators(report.bundle)
    record = Bundle.open(report.bundle).manifest.quantization
    assert record is not None and record.judged_on is None and {each.activation for each in record.sites} == {None}


@functools.cache
def _portable(style: str, model: str, folder: Path) -> tuple[Checkpoint, ir.Model]:
    checkpoint = Checkpoint.open(write_quantized(EXAMPLES / model, folder / f"{style}-{model}", STYLES[style]()))
    traced = trace(checkpoint, ir.DataType.FLOAT)
    return checkpoint, instantiate(optimize(traced.model, target="portable", positions=256).model, traced, checkpoint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scales")


@pytest.mark.parametrize(
    ("style", "model", "target", "dtype", "settings", "sentences"),
    [
        ("modelopt-fp8", "tiny-qwen2", "portable", "FLOAT", None, []),
        ("modelopt-fp8", "tiny-qwen2", "tensorrt", "BFLOAT16", {"device": "h200", "attention": "plugin"}, []),
        ("modelopt-fp8", "tiny-qwen2", "tensorrt-rtx", "BFLOAT16", {}, ["fp8 caches .* add --attention plugin"]),
        (
            "modelopt-fp8",
            "tiny-qwen2",
            "ort-cpu",
            "FLOAT",
            None,
            ["fp8 activations .* no FP8 product on a CPU", "fp8 caches .* no 8-bit cache on a CPU"],
        ),
        (
            "modelopt-fp8",
            "tiny-qwen2",
            "ort-cuda",
            "BFLOAT16",
            {"attention": "plugin"},
            ["fp8 activations .* ONNX Runtime on CUDA multiplies no quantized activations"],
        ),
        (
            "compressed-fp8-tensor-static",
            "tiny-qwen2",
            "tensorrt",
            "FLOAT16",
            {"device": "a100", "attention": "plugin"},
            [r"fp8 caches .* a100 has no FP8 arithmetic"],
        ),
        ("compressed-w8a8-static", "tiny-qwen2", "ort-cpu", "FLOAT16", None, ["int8 activations .* --dtype fp32"]),
        ("compressed-w8a8-static", "tiny-qwen2-moe", "ort-cpu", "FLOAT", None, ["tokens of experts in 3 layers"]),
    ],
)
def test_what_a_target_cannot_use_is_left_out_in_a_sentence(
    style: str,
    model: str,
    target: str,
    dtype: str,
    settings: dict[str, str] | None,
    sentences: list[str],
    folder: Path,
) -> None:
    checkpoint, portable = _portable(style, model, folder)
    choice = None if settings is None else choose(target, **settings)  # type: ignore[arg-type]
    found = usable_scales(checkpoint, portable, ScalesRequest(), target=target, dtype=ir.DataType[dtype], choice=choice)
    assert len(found.left_out) == len(sentences)
    for sentence, pattern in zip(found.left_out, sentences, strict=True):
        assert re.search(pattern, sentence) and sentence.startswith("the checkpoint's static scales of ")
    left = " ".join(found.left_out)
    kept = found.plan
    assert bool(kept and kept.caches) == (checkpoint.quantized.format.cache is not None and "caches" not in left)  # type: ignore[union-attr]
    assert bool(kept and kept.sites) == ("activations" not in left)


def test_dequantize_leaves_activations_and_caches_as_they_are(folder: Path) -> None:
    checkpoint, portable = _portable("modelopt-fp8", "tiny-qwen2", folder)
    found = usable_scales(
        checkpoint.widened(), portable, ScalesRequest(), target="ort-cpu", dtype=ir.DataType.FLOAT, choice=None
    )
    assert found.plan is None
    (sentence,) = found.left_out
    assert "fp8 activations and fp8 caches" in sentence and "--dequantize leaves both" in sentence


@pytest.mark.parametrize(
    ("style", "request_", "message"),
    [
        ("gptq-int4-group128", ScalesRequest(budget="kl=1"), "--budget goes with --quantize RECIPE, or with static"),
        ("gptq-int4-group128", ScalesRequest(heldout_data=Path("x")), "--heldout-data goes with --quantize RECIPE"),
        (
            "gptq-int4-group128",
            ScalesRequest(apply=False),
            "ignore is for checkpoints with such scales, and",
        ),
        ("modelopt-fp8", ScalesRequest(apply=False, budget="kl=1"), "--budget judges the checkpoint's static scales"),
    ],
)
def test_arguments_without_anything_to_judge_are_refused(
    style: str, request_: ScalesRequest, message: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(write_quantized(EXAMPLES / "tiny-qwen2", tmp_path / "q", STYLES[style]()))
    with pytest.raises(UserError, match=message):
        require_scales(checkpoint, request_)


def test_command_line_says_what_was_applied_and_what_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_quantized(EXAMPLES / "tiny-qwen2", tmp_path / "q", STYLES["modelopt-fp8"]())
    bundle = str(tmp_path / "bundle")
    command = ["export", str(source), "-o", bundle, "--target", "tensorrt-rtx", "--max-length", "256", "--no-verify"]
    assert main([*command, "--budget", "kl=0.5"]) == 0
    streams = capsys.readouterr()
    assert "applied the checkpoint's static scales, fp8 inputs of 18 products or experts" in streams.out
    assert "(budget 0.5)" in streams.out
    assert streams.err.count("the checkpoint's static scales of fp8 caches are not used") == 1
    assert main(["inspect", bundle]) == 0
    shown = capsys.readouterr().out
    assert "the checkpoint's own" in shown and "18 fp8, 1 as the model's" in shown


def test_static_scales_beside_quantize_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(EXAMPLES / "tiny-qwen2"), "-o", str(tmp_path / "b"), "--quantize", "int8-weight-only"]
    assert main([*command, "--static-scales", "ignore"]) == 1
    assert "--static-scales is for checkpoints that are quantized already" in capsys.readouterr().err


def test_fp8_experts_without_static_scales_are_refused_with_the_alternatives(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"FP8 by FP8 alone; .*--target portable; .*which --dequantize stores"):
        _export(STYLES["modelopt-fp8-per-channel"](), "tiny-qwen2-moe", tmp_path, "tensorrt-rtx", verify_result=False)
