"""Quantized checkpoints from folder to verified bundle: sizes, what the bundle says, and the way out of a refusal."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from qwenforge.bundle import Bundle
from qwenforge.engine.export import export_checkpoint
from qwenforge.engine.planning.known_models import model_config, stored_format
from qwenforge.engine.planning.model_size import count_parameters
from qwenforge.engine.planning.recipes import stored_recipe
from qwenforge.errors import UnsupportedError, UserError
from support.prequantized_checkpoints import Style, gptq, write_quantized
from support.prequantized_styles import STYLES

EXAMPLES = Path(__file__).parents[2] / "examples" / "checkpoints"


@pytest.mark.parametrize(
    ("style", "model", "target"),
    [
        ("gptq-int4-group128", "tiny-qwen2", "ort-cpu"),
        ("awq-group32", "tiny-qwen2", "ort-cpu"),
        ("gptq-int4-group128", "tiny-qwen2-moe", "ort-cpu"),
        ("compressed-fp8-block", "tiny-qwen2", "portable"),
        ("gptq-int4-group64", "tiny-qwen2-moe", "tensorrt-rtx"),
        ("gptq-int8-whole-row", "tiny-qwen2-moe", "tensorrt-rtx"),
        ("awq-group128", "tiny-qwen2", "tensorrt-rtx"),
        ("gptq-int8-group128", "tiny-qwen2", "tensorrt-rtx"),
    ],
)
def test_bundle_is_verified_and_holds_the_codes(style: str, model: str, target: str, tmp_path: Path) -> None:
    folder = write_quantized(EXAMPLES / model, tmp_path / "q", STYLES[style]())
    report = export_checkpoint(folder, tmp_path / "bundle", target=target, max_length=256)
    assert report.verification is not None and report.verification.token_disagreements == 0
    manifest = Bundle.open(report.bundle, verify="full").manifest
    kind = style.split("-")[0]
    assert manifest.source.dtype.endswith(f"({ {'compressed': 'compressed-tensors'}.get(kind, kind) })")
    parameters = count_parameters(model_config(str(folder))[1])
    # All but the matrices is fp32 here, the embedding perhaps twice; the matrices would be 4 bytes each.
    others = 4 * (2 * parameters.embedding + parameters.other)
    assert report.data_bytes < others + 2 * (parameters.dense + parameters.experts)


def test_experts_of_gptq_are_packed_for_the_plugin(tmp_path: Path) -> None:
    folder = write_quantized(EXAMPLES / "tiny-qwen2-moe", tmp_path / "q", STYLES["gptq-int4-group64"]())
    report = export_checkpoint(folder, tmp_path / "bundle", target="tensorrt-rtx", max_length=256, verify_result=False)
    nodes = [node for node in ir.load(report.bundle / "model.onnx").graph if node.op_type == "QwenForgeMoE"]
    assert len(nodes) == 3
    for node in nodes:
        assert node.attributes["weight_type"].as_int() == 2 and node.attributes["group_size"].as_int() == 64
        assert node.attributes["num_shared_experts"].as_int() == 2  # the shared expert of 256 is two of 128
    record = Bundle.open(report.bundle).manifest.quantization
    assert record is not None and record.recipe == "checkpoint" and record.judged_on is None
    counted = {(each.weight, each.group_size): each.sites for each in record.sites}
    # Four of attention, experts, and two of the shared expert in each layer; routers, shared gates and the vocabulary.
    assert counted == {("int4", 64): 3 * 7, ("kept", None): 3 * 2 + 1}


@pytest.mark.parametrize(
    ("style", "model", "message"),
    [
        ("awq-group32", "tiny-qwen2", "groups of 32 of .*, with zero points, .*use --target ort-cpu or ort-cuda"),
        ("compressed-fp8-block", "tiny-qwen2", "groups of 128 columns, and TensorRT's FP8 .*use --target portable"),
        ("awq-group128", "tiny-qwen2-moe", "zero points and the plugin's weights are symmetric.*use --target ort-cpu"),
    ],
)
def test_what_tensorrt_has_no_form_for_is_refused_with_the_alternatives(
    style: str, model: str, message: str, tmp_path: Path
) -> None:
    folder = write_quantized(EXAMPLES / model, tmp_path / "q", STYLES[style]())
    with pytest.raises(UnsupportedError, match=f"{message}.*which --dequantize stores"):
        export_checkpoint(folder, tmp_path / "bundle", target="tensorrt-rtx", max_length=256, verify_result=False)


def test_layers_of_which_some_are_quantized_are_exported(tmp_path: Path) -> None:
    style = gptq(group_size=64)
    folder = write_quantized(
        EXAMPLES / "tiny-qwen2", tmp_path / "q", Style(style.config, style.pack, keep=r"layers\.1\.|layers\.0\.mlp\.up")
    )
    report = export_checkpoint(folder, tmp_path / "bundle", target="ort-cpu", max_length=256)
    assert report.verification is not None and report.verification.token_disagreements == 0


def test_fp8_on_the_cpu_is_refused_with_the_way_out_and_exported_by_it(tmp_path: Path) -> None:
    folder = write_quantized(EXAMPLES / "tiny-qwen2", tmp_path / "q", STYLES["modelopt-fp8"]())
    with pytest.raises(UnsupportedError, match=r"no FP8 product.*holds fp8 \(modelopt\) weights, which --dequantize"):
        export_checkpoint(folder, tmp_path / "bundle", target="ort-cpu", max_length=256)
    assert not (tmp_path / "bundle").exists()
    report = export_checkpoint(folder, tmp_path / "bundle", target="ort-cpu", max_length=256, dequantize=True)
    assert report.verification is not None and report.verification.token_disagreements == 0


def test_dequantize_of_an_unquantized_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dequantize is for quantized checkpoints"):
        export_checkpoint(EXAMPLES / "tiny-qwen2", tmp_path / "bundle", dequantize=True)


def test_plan_counts_a_quantized_checkpoint_as_it_is(tmp_path: Path) -> None:
    folder = write_quantized(EXAMPLES / "tiny-qwen2", tmp_path / "q", STYLES["gptq-int4-group128"]())
    config = model_config(str(folder))[1]
    stored = stored_format(str(folder), config)
    assert stored is not None
    parameters = count_parameters(config)
    # Codes and scales as in the files (which also hold zero points, indices and biases of zeros).
    expected = parameters.dense * (4 + 16 / 128) / 8 + 2 * (parameters.embedding + parameters.other)
    assert stored_recipe(stored).weight_bytes(parameters) == pytest.approx(expected)
    assert stored_recipe(stored).weight == "int4"
