"""Quantized checkpoints from folder to verified bundle: sizes, what the bundle says, and the way out of a refusal."""

from __future__ import annotations

from pathlib import Path

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
