"""The values that a quantized checkpoint's weights stand for, by the formats' own software where it runs here.

compressed-tensors decompresses its own files, and AWQ's through its converter; GPTQ's and the FP8 formats' formulas are
one line each and are computed here with torch, in the dtype that the original software computes in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def reference_weights(folder: Path, *, exact: bool = False) -> Tensors:
    """Every quantized weight [N, K] by name, in the dtype that the format's own software gives it.

    ``exact``: widen the scales first, so that the software computes in float32 and no product is rounded.
    """
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {"quant_method": "modelopt"})
    one = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "modelopt": _fp8,
        "fp8": _fp8,
    }[config["quant_method"]]
    modules: dict[str, Tensors] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        widened = exact and "scale" in part and tensor.is_floating_point()
        modules.setdefault(module, {})[part] = tensor.float() if widened else tensor
    return {
        f"{module}.weight": one(parts, config)
        for module, parts in modules.items()
        if parts.keys() & {"qweight", "weight_scale", "weight_scale_inv"}
    }


def reference_model(example: Path, folder: Path) -> Any:
    """transformers' model with the values that the quantized checkpoint's own software computes in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32).eval()
    values = {name: tensor.float() for name, tensor in reference_weights(folder, exact=True).items()}
    state = model.state_dict()
    for name, parameter in state.items():
        if name in values:
            parameter.copy_(values[name])
        elif name.endswith(".experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            for index, expert in enumerate(parameter):
                parts = [values[f"{stem}.{index}.{part}.weight"] for part in ("gate_proj", "up_proj")]
                expert.copy_(torch.cat(parts))
        elif name.endswith(".experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            for index, expert in enumerate(parameter):
                expert.copy_(values[f"{stem}.{index}.down_proj.weight"])
    return model


def _gptq(parts: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    """AutoGPTQ: scales[g] * (code - zero[g]) in the scales' dtype, zero = stored + 1 in the first version."""
    bits = config["bits"]
    codes = _fields(parts["qweight"], bits, axis=0)
    points = _fields(parts["qzeros"], bits, axis=1) + (0 if config.get("checkpoint_format") == "gptq_v2" else 1)
    group = parts["g_idx"].long()
    difference = (codes - points[group]).to(parts["scales"].dtype)
    return (parts["scales"][group] * difference).T


def _awq(parts: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationScheme

    converter = AutoAWQConverter.from_autoawq_config(dict(config))
    converted = converter.process({f"module.{part}": tensor for part, tensor in parts.items()})
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": config["group_size"],
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {name.removeprefix("module."): value for name, value in converted.items()}
    return compressor.decompress(state, scheme)["weight"]


def _compressed_tensors(parts: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    return BaseCompressor.get_value_from_registry(config["format"]).decompress(dict(parts), scheme)["weight"]


def _fp8(parts: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    """vLLM and ModelOpt: code * scale in float32."""
    weight = parts["weight"].float()
    if "weight_scale_inv" in parts:
        rows, columns = weight.shape
        spread = parts["weight_scale_inv"].repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        return weight * spread
    scale = parts["weight_scale"]
    return weight * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)


def _fields(words: torch.Tensor, bits: int, *, axis: int) -> torch.Tensor:
    shifts = torch.arange(0, 32, bits)
    moved = words.movedim(axis, -1)
    fields = (moved.long().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return fields.flatten(-2).movedim(-1, axis)
