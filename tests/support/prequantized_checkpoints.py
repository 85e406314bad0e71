"""Quantized checkpoints in the published formats, made from a small one: weights rounded to nearest and packed.

The packing is written from the formats' descriptions with torch's integer arithmetic, one field at a time, and shares
nothing with the reader under test. compressed-tensors files are packed by that package itself.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Packer = Callable[[str, torch.Tensor], Tensors]

_QUANTIZED = re.compile(r"(model\.layers\.\d+\..*_proj)\.weight")
AWQ_FIELD_OF_CHANNEL = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Style:
    """A format with its options: what goes into config.json, and how a matrix [N, K] is stored.

    Attributes:
        config: the ``quantization_config``.
        pack: the tensors of a module by the last part of their names, from its name and weight.
        files: other JSON files of the folder.
        extra: tensors of a layer besides, by the last parts of their names under ``self_attn``.
        keep: modules, by regular expression, that stay as they are.
    """

    config: dict[str, Any] | None
    pack: Packer
    files: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    keep: str = r"$^"


def write_quantized(source: Path, folder: Path, style: Style, *, seed: int = 0) -> Path:
    """Write the checkpoint in ``source``, its projections quantized, into ``folder`` and return it."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copy(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    if style.config is not None:
        config["quantization_config"] = style.config
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name, content in style.files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    torch.manual_seed(seed)
    written: Tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            match = _QUANTIZED.fullmatch(name)
            if match is None or re.search(style.keep, name):
                written[name] = tensor
                continue
            packed = style.pack(match[1], tensor.float())
            written |= {f"{match[1]}.{part}": value.contiguous() for part, value in packed.items()}
    for layer in range(config["num_hidden_layers"]):
        written |= {f"model.layers.{layer}.self_attn.{part}": value.clone() for part, value in style.extra.items()}
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gptq(
    *, bits: int = 4, group_size: int = 128, symmetric: bool = True, version: str = "gptq", act_order: bool = False
) -> Style:
    """GPTQ; every module has a bias, as AutoGPTQ's have."""
    config = {
        "bits": bits,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": act_order,
        "static_groups": False,
        "sym": symmetric,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
    }
    if version != "gptq":
        config["checkpoint_format"] = version
    less = 1 if version == "gptq" else 0

    def pack(module: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        size = columns if group_size == -1 else group_size
        group = torch.arange(columns) // size
        if act_order:
            group = group[torch.randperm(columns)]
        codes, scales, points = _rounded(weight, group, bits, symmetric)
        packed = {
            "qweight": _words(codes.T, bits, axis=0),
            "qzeros": _words(points.T - less, bits, axis=1),
            "scales": scales.T.half(),
            "g_idx": group.int(),
        }
        # AutoGPTQ saves a bias of zeros where the model has none; q, k and v keep their own.
        return packed if re.search(r"[qkv]_proj$", module) else packed | {"bias": torch.zeros(rows).half()}

    return Style(config, pack)


def awq(*, group_size: int = 128) -> Style:
    """AWQ in the gemm version."""
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }

    def pack(module: str, weight: torch.Tensor) -> Tensors:
        group = torch.arange(weight.shape[1]) // group_size
        codes, scales, points = _rounded(weight, group, 4, symmetric=False)
        field_of = torch.tensor(AWQ_FIELD_OF_CHANNEL)

        def interleaved(values: torch.Tensor) -> torch.Tensor:
            fields = torch.empty(values.shape[0], values.shape[1] // 8, 8, dtype=torch.int64)
            fields[:, :, field_of] = values.reshape(values.shape[0], -1, 8)
            return _words(fields.reshape(values.shape), 4, axis=1)

        return {"qweight": interleaved(codes.T), "qzeros": interleaved(points.T), "scales": scales.T.half()}

    return Style(config, pack)


def compressed_tensors(
    layout: str,
    weights: dict[str, Any],
    inputs: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    input_scales: Mapping[str, float] | None = None,
) -> Style:
    """A compressed-tensors checkpoint, compressed by the package: ``weights`` and ``inputs`` are its arguments.

    Static scales of inputs are those of ``input_scales`` by module, by default random ones.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    described: dict[str, Any] = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    scheme = QuantizationScheme(**described)
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": described},
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"],
        "kv_cache_scheme": cache,
    }

    def pack(module: str, weight: torch.Tensor) -> Tensors:
        arguments = scheme.weights
        assert arguments is not None
        weight = weight.bfloat16()
        if weights["strategy"] == "group":
            blocks = weight.reshape(weight.shape[0], -1, weights["group_size"])
            low, high = blocks.amin(-1), blocks.amax(-1)
        elif weights["strategy"] == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        elif weights["strategy"] == "block":
            padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128))
            cut = padded.reshape(padded.shape[0] // 128, 128, -1, 128)
            low, high = cut.amin((1, 3)), cut.amax((1, 3))
        else:
            low, high = weight.amin().reshape(1), weight.amax().reshape(1)
        scale, zero = calculate_qparams(low, high, arguments)
        state = {"weight": weight, "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
        state = BaseCompressor.get_value_from_registry(layout).compress(state, scheme)
        if inputs is not None and not inputs.get("dynamic"):
            scale = 0.01 + 0.05 * torch.rand(1)
            state["input_scale"] = scale if input_scales is None else torch.tensor([input_scales[module]])
        return {name: value for name, value in state.items() if value is not None}

    extra = {f"{x}_scale": torch.tensor([0.03 + 0.01 * i]) for i, x in enumerate("kv")} if cache else {}
    return Style(config, pack, extra=extra)


def observed_input_scales(source: Path, largest: float, *, seed: int = 0) -> dict[str, float]:
    """By module, the largest input of each projection on 1024 random tokens, divided by ``largest``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: dict[str, float] = {}

    def watch(name: str) -> Callable[[Any, Any], None]:
        def hook(_: Any, inputs: Any) -> None:
            seen[name] = max(seen.get(name, 0.0), float(inputs[0].abs().max()) / largest)

        return hook

    for name, module in model.named_modules():
        if _QUANTIZED.fullmatch(f"{name}.weight"):
            module.register_forward_pre_hook(watch(name))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model(torch.randint(0, model.config.vocab_size, (4, 256), generator=generator))
    return seen


def modelopt(*, per_channel: bool = False, only_file: bool = False, cache: bool = True) -> Style:
    """ModelOpt FP8; ``only_file`` leaves config.json without a word, as older releases did."""
    algorithm = "FP8_PER_CHANNEL_PER_TOKEN" if per_channel else "FP8"
    details = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8" if cache else None, "exclude_modules": ["lm_head"]}
    file = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": details}
    config = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"} if cache else None,
    }

    def pack(module: str, weight: torch.Tensor) -> Tensors:
        packed = _fp8(weight, weight.abs().amax(1) / 448 if per_channel else weight.abs().amax() / 448)
        if not per_channel:
            packed["input_scale"] = 0.01 + 0.05 * torch.rand(())
        return packed

    extra = {f"{x}_proj.{x}_scale": torch.tensor(0.03 + 0.01 * i) for i, x in enumerate("kv")} if cache else {}
    return Style(None if only_file else config, pack, {"hf_quant_config.json": file}, extra)


def plain_fp8(*, block: bool = False) -> Style:
    """``quant_method: fp8``, with a static scale a tensor or with scales of 128 x 128 blocks."""
    if not block:

        def pack(module: str, weight: torch.Tensor) -> Tensors:
            return _fp8(weight, weight.abs().amax() / 448) | {"input_scale": torch.tensor([0.04])}

        return Style({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, pack)

    def pack_blocks(module: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
        blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
        scales = blocks.abs().amax((1, 3)) / 448
        spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        return {"weight": (weight / spread).to(torch.float8_e4m3fn), "weight_scale_inv": scales}

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return Style(config, pack_blocks)


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> Tensors:
    spread = scale[:, None] if scale.dim() else scale
    return {"weight": (weight / spread).to(torch.float8_e4m3fn), "weight_scale": scale}


def _rounded(
    weight: torch.Tensor, group: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unsigned codes [N, K], scales [N, G] and zero points [N, G] of columns in groups ``group`` [K]."""
    count, most = int(group.max()) + 1, (1 << bits) - 1
    scales, points = torch.empty(len(weight), count), torch.empty(len(weight), count)
    for index in range(count):
        block = weight[:, group == index]
        if symmetric:
            scales[:, index] = block.abs().amax(1) / (most // 2)
            points[:, index] = (most + 1) // 2
        else:
            low, high = block.amin(1).clamp(max=-1e-4), block.amax(1).clamp(min=1e-4)
            scales[:, index] = (high - low) / most
            # Not 0: less 1 it would be no field of a word.
            points[:, index] = torch.round(-low / scales[:, index]).clamp(1, most)
    scales = scales.half().float()
    codes = torch.round(weight / scales[:, group] + points[:, group]).clamp(0, most)
    return codes.long(), scales, points.long()


def _words(fields: torch.Tensor, bits: int, *, axis: int) -> torch.Tensor:
    """Unsigned ``fields`` packed along ``axis``, the first of a word in its lowest bits."""
    moved = fields.movedim(axis, -1)
    count = 32 // bits
    split = moved.reshape(*moved.shape[:-1], -1, count)
    words = torch.zeros(split.shape[:-1], dtype=torch.int64)
    for place in range(count):
        words |= split[..., place] << (bits * place)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.movedim(-1, axis).to(torch.int32)
