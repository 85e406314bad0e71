"""Quantized checkpoints that are refused: one sentence that names the file, field or tensor, and what is supported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenforge.errors import CheckpointError, UnsupportedError, UserError
from qwenforge.exporter.checkpoint import Checkpoint
from support.prequantized_checkpoints import gptq, write_quantized
from support.prequantized_styles import STYLES

EXAMPLE = Path(__file__).parents[3] / "examples" / "checkpoints" / "tiny-qwen2"
MODULE = "model.layers.1.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def write(style: str) -> Path:
        if style not in made:
            made[style] = write_quantized(EXAMPLE, tmp_path_factory.mktemp(style), STYLES[style]())
        return made[style]

    return write


def _changed(source: Path, folder: Path, *, config: dict[str, Any] | None = None, tensors: Any = None) -> Path:
    """A copy of ``source`` with fields of its quantization_config replaced, or its tensors changed by a function."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    described = json.loads((source / "config.json").read_text())
    described["quantization_config"] |= config or {}
    (folder / "config.json").write_text(json.dumps(described))
    stored = load_file(source / "model.safetensors")
    if tensors is not None:
        tensors(stored)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    return folder


CONFIGURATIONS = [
    ("gptq-int4-group128", {"quant_method": "marlin"}, r"'quant_method' is 'marlin'; supported: gptq, awq, comp"),
    ("gptq-int4-group128", {"quant_method": ["gptq"]}, r"'quant_method' is \['gptq'\]; supported"),
    ("gptq-int4-group128", {"bits": 3}, "'bits' is 3; supported: 4, 8"),
    ("gptq-int4-group128", {"bits": True}, "'bits' is True; supported: 4, 8"),
    (
        "gptq-int4-group128",
        {"checkpoint_format": "marlin"},
        "'checkpoint_format' is 'marlin'; supported: gptq, gptq_v2",
    ),
    ("gptq-int4-group128", {"group_size": 100}, "'group_size' is 100; supported: 16, 32, 64, 128 and -1"),
    ("gptq-int4-group128", {"dynamic": {"+:.*mlp.*": {"bits": 8}}}, "'dynamic' gives modules different formats"),
    ("awq-group128", {"version": "gemv"}, "'version' is 'gemv'; supported: gemm"),
    ("awq-group128", {"zero_point": False}, "'zero_point' is False; supported: True"),
    ("compressed-fp8-channel-dynamic", {"format": "nvfp4-pack-quantized"}, "'format' is 'nvfp4-pack-quantized'"),
    ("compressed-fp8-channel-dynamic", {"config_groups": {}}, "'config_groups' must say how weights are quantized"),
    ("compressed-fp8-channel-dynamic", {"quantization_status": "frozen"}, "'quantization_status' is 'frozen'"),
    ("compressed-fp8-channel-dynamic", {"transform_config": {"u": {"type": "hadamard"}}}, "'transform_config' is not"),
    ("compressed-fp8-channel-dynamic", {"kv_cache_scheme": {"num_bits": 4}}, "kv_cache_scheme: 'num_bits' is 4"),
    ("modelopt-fp8", {"quant_algo": "NVFP4"}, "'quant_algo' is 'NVFP4'; supported: FP8, FP8_PER_CHANNEL_PER_TOKEN"),
    ("plain-fp8-block", {"weight_block_size": [64, 64]}, r"'weight_block_size' is \[64, 64\]; supported: \[128, 128\]"),
    ("plain-fp8-static", {"activation_scheme": "per_token"}, "'activation_scheme' is 'per_token'; supported"),
]


@pytest.mark.parametrize(("style", "fields", "message"), CONFIGURATIONS)
def test_configuration_is_refused_naming_what_is_supported(
    style: str, fields: dict[str, Any], message: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = _changed(written(style), tmp_path / "changed", config=fields)
    with pytest.raises(UnsupportedError, match=message) as refused:
        Checkpoint.open(folder)
    assert str(folder / "config.json") in str(refused.value)


def test_schemes_that_differ_between_modules_are_refused(written: Callable[[str], Path], tmp_path: Path) -> None:
    source = written("compressed-w4a16-group128")
    group = json.loads((source / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    other = group | {"weights": group["weights"] | {"num_bits": 8}, "targets": ["re:.*down_proj"]}
    folder = _changed(source, tmp_path / "mixed", config={"config_groups": {"a": group, "b": other}})
    with pytest.raises(UnsupportedError, match="mix several schemes; use a checkpoint with one"):
        Checkpoint.open(folder)


def _drop(name: str) -> Callable[[Tensors], None]:
    def dropped(stored: Tensors) -> None:
        del stored[f"{MODULE}.{name}"]

    return dropped


def _replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def replaced(stored: Tensors) -> None:
        stored[f"{MODULE}.{name}"] = change(stored[f"{MODULE}.{name}"])

    return replaced


def _add(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda stored: stored.update({f"{MODULE}.{name}": tensor})


TENSORS: list[tuple[str, Any, type[UserError], str]] = [
    ("gptq-int4-group128", _drop("qzeros"), CheckpointError, r"lacks tensor 'model.layers.1.mlp.up_proj.qzeros'"),
    ("gptq-int4-group128", _drop("qweight"), CheckpointError, r"lacks tensor 'model.layers.1.mlp.up_proj.qweight'"),
    ("awq-group128", _drop("scales"), CheckpointError, r"lacks tensor 'model.layers.1.mlp.up_proj.scales'"),
    ("modelopt-fp8", _drop("weight_scale"), CheckpointError, r"lacks tensor '.*up_proj.weight_scale'"),
    ("modelopt-fp8", _drop("input_scale"), CheckpointError, r"lacks tensor '.*up_proj.input_scale'"),
    (
        "gptq-int4-group128",
        _replace("qweight", lambda words: words[:-1]),
        CheckpointError,
        r"up_proj.qweight' has shape \[31, 512\] but config.json makes it \[32, 512\]",
    ),
    (
        "gptq-int4-group128",
        _replace("scales", lambda scales: scales.repeat(2, 1)),
        CheckpointError,
        r"up_proj.scales' has shape \[4, 512\] but config.json makes it \[2, 512\]",
    ),
    (
        "gptq-int4-group128",
        _replace("qweight", lambda words: words.to(torch.int64)),
        CheckpointError,
        "up_proj.qweight' has dtype I64, only I32 are supported",
    ),
    (
        "gptq-int4-group128",
        _add("weight", torch.zeros(512, 256)),
        CheckpointError,
        "holds tensor 'model.layers.1.mlp.up_proj.weight', which config.json leaves no place for",
    ),
    (
        "gptq-int4-group128",
        _replace("bias", lambda bias: bias + 1),
        UnsupportedError,
        "up_proj.bias' is a bias that the architecture has no place for and is not zero",
    ),
    (
        "gptq-int4-group128",
        _replace("qzeros", lambda words: words + 1),
        UnsupportedError,
        "up_proj.qzeros holds the zero point 9 although 'sym' is true",
    ),
    (
        "gptq-int4-asymmetric",
        _replace("qzeros", lambda words: words | 15),
        UnsupportedError,
        "up_proj.qzeros holds a zero point of 16, which programs read as that or as 0",
    ),
    (
        "compressed-w4a16-group128",
        _replace("weight_shape", lambda shape: shape + 1),
        CheckpointError,
        r"up_proj.weight_shape is \[513, 257\] but config.json makes it \[512, 256\]",
    ),
    (
        "modelopt-fp8",
        _replace("input_scale", lambda scale: scale * 0),
        CheckpointError,
        "up_proj.input_scale' holds the scale 0.0, not a positive number",
    ),
    (
        "modelopt-fp8",
        _replace("input_scale", lambda scale: scale * float("nan")),
        CheckpointError,
        "up_proj.input_scale' holds the scale nan",
    ),
]


@pytest.mark.parametrize(("style", "change", "error", "message"), TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(
    style: str,
    change: Callable[[Tensors], None],
    error: type[UserError],
    message: str,
    written: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = _changed(written(style), tmp_path / "changed", tensors=change)
    with pytest.raises(error, match=message):
        Checkpoint.open(folder)


def test_groups_scattered_by_activation_order_are_refused(tmp_path: Path) -> None:
    folder = write_quantized(EXAMPLE, tmp_path / "q", gptq(group_size=64, act_order=True))
    with pytest.raises(UnsupportedError, match=r"g_idx scatters the columns of a group .*desc_act"):
        Checkpoint.open(folder)


def test_activation_order_within_static_groups_is_accepted(written: Callable[[str], Path], tmp_path: Path) -> None:
    """desc_act with static groups leaves each group's columns side by side: the indices decide, not the flag."""
    folder = _changed(written("gptq-int4-group128"), tmp_path / "q", config={"desc_act": True, "static_groups": True})
    assert Checkpoint.open(folder).quantized is not None


def test_configuration_without_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    style = gptq()
    folder = write_quantized(EXAMPLE, tmp_path / "q", type(style)(style.config, style.pack, keep="."))
    with pytest.raises(CheckpointError, match="says that the weights are quantized, but no tensor is"):
        Checkpoint.open(folder)


def test_quantized_tensors_without_a_configuration_are_refused(written: Callable[[str], Path], tmp_path: Path) -> None:
    source = written("compressed-w8a8-dynamic")
    folder = _changed(source, tmp_path / "q")
    described = json.loads((folder / "config.json").read_text())
    del described["quantization_config"]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"weight_scale' \(and 20 more\), which config.json leaves no place"):
        Checkpoint.open(folder)
