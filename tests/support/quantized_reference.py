"""Quantization in PyTorch, module by module: plans by absolute maximum, and the fake-quantized model they describe.

It shares no code with the graph passes: smoothing, rounding and the places of both are written here once more, on
transformers' modules, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from qwenforge.exporter.quantized_weights import WeightFormat
from qwenforge.graph_passes.quantize.plan import CachePlan, QuantizationPlan, SitePlan

_LARGEST = {"int8": 127, "int4": 7, "uint4": 15, "fp8": 448}
_LOWEST_HIGHEST = {"int8": (-127, 127), "int4": (-8, 7), "uint4": (0, 15), "fp8": (-448, 448)}


@dataclass(frozen=True)
class Scheme:
    """What a plan is to do with every site but router, shared gate and vocabulary.

    ``dtype`` is that of the model the plan is for: scales are rounded to it. ``smooth``: with random factors.
    """

    weight: WeightFormat
    group_size: int | None = None
    activation: Literal["int8", "fp8"] | None = None
    smooth: bool = False
    cache: Literal["int8", "fp8"] | None = None
    dtype: str = "float32"


def make_plan(model: Any, scheme: Scheme, *, seed: int = 0) -> QuantizationPlan:
    """A plan for the fp32 transformers model ``model``; activations are seen on 64 random tokens."""
    import torch

    tensors: dict[str, Any] = {}
    smoothed: list[str] = []
    generator = torch.Generator().manual_seed(seed)
    if scheme.smooth:
        for name, shape in _smoothing_places(model):
            tensors[f"{name}.smoothing"] = torch.exp(0.5 * torch.randn(shape, generator=generator))
            smoothed.append(name)
    reference = _smoothed(model, {name: tensors[f"{name}.smoothing"] for name in smoothed})
    tokens = torch.randint(0, model.config.vocab_size, (4, 16), generator=generator)
    seen = _absolute_maxima(reference, tokens)
    sites: dict[str, SitePlan] = {}
    for name, modules in _linear_sites(reference):
        matrix = torch.cat([module.weight for module in modules])
        sites[name] = SitePlan(weight=scheme.weight, group_size=scheme.group_size, activation=scheme.activation)
        scales, points = _scales(matrix, scheme)
        tensors[f"{name}.weight_scales"] = scales
        if points is not None:
            tensors[f"{name}.weight_zero_points"] = points
        if scheme.activation is not None:
            tensors[f"{name}.input_scale"] = seen[modules[0]] / _LARGEST[scheme.activation]
    for name, experts in _expert_sites(reference):
        fp8 = "fp8" if scheme.activation == "fp8" else None
        sites[name] = SitePlan(weight=scheme.weight, group_size=scheme.group_size, activation=fp8)
        for part, stacked in (("gate_up", experts.gate_up_proj), ("down", experts.down_proj)):
            each = [_scales(matrix, scheme) for matrix in stacked]
            tensors[f"{name}.{part}_scales"] = torch.stack([scales for scales, _ in each])
            if scheme.weight == "uint4":
                tensors[f"{name}.{part}_zero_points"] = torch.stack([points for _, points in each])
        if fp8:
            tensors[f"{name}.activation_scales"] = seen[experts] / 448
    caches: dict[str, CachePlan] = {}
    if scheme.cache is not None:
        for layer, attention in _attentions(reference):
            name = f"{layer}.self_attn.cache"
            caches[name] = CachePlan(format=scheme.cache)
            keys, values = seen[attention]
            tensors[f"{name}.key_scales"] = keys / _LARGEST[scheme.cache]
            tensors[f"{name}.value_scales"] = values / _LARGEST[scheme.cache]
    lazy = {
        name: ir.tensor(tensor.detach().float().numpy().reshape(tensor.shape), name=name)
        for name, tensor in tensors.items()
    }
    return QuantizationPlan("test", sites, caches, tuple(smoothed), lazy)


def fake_quantized(model: Any, plan: QuantizationPlan, *, dtype: str = "float32") -> Any:
    """A float64 copy of ``model`` that computes what ``plan`` says; scales are rounded to ``dtype`` first."""
    import torch

    def numbers(name: str) -> Any:
        return torch.from_numpy(np.array(plan.tensors[name].numpy(), dtype=np.float32))

    def rounded(name: str) -> Any:
        return numbers(name).to(getattr(torch, dtype)).double()

    copied = _smoothed(model, {name: numbers(f"{name}.smoothing") for name in plan.smoothed}).double()
    for name, modules in _linear_sites(copied):
        site = plan.sites.get(name)
        if site is None:
            continue
        if site.weight is not None:
            points = numbers(f"{name}.weight_zero_points") if f"{name}.weight_zero_points" in plan.tensors else None
            rows, scales = [len(module.weight) for module in modules], rounded(f"{name}.weight_scales")
            matrix = torch.cat([module.weight for module in modules])
            quantized = quantize_dequantize(matrix, scales, site.weight, site.group_size, points)
            for module, part in zip(modules, quantized.split(rows), strict=True):
                module.weight.data = part.contiguous()
        for module in modules:
            if site.activation is not None:
                scale, kind = rounded(f"{name}.input_scale"), site.activation
                module.register_forward_pre_hook(
                    lambda _, inputs, scale=scale, kind=kind: (quantize_dequantize(inputs[0], scale, kind),)
                )
    for name, experts in _expert_sites(copied):
        site = plan.sites.get(name)
        if site is None:
            continue
        for part, parameter in (("gate_up", experts.gate_up_proj), ("down", experts.down_proj)):
            if site.weight is None:
                continue
            points = f"{name}.{part}_zero_points"
            each = numbers(points) if points in plan.tensors else [None] * len(parameter)
            parameter.data = torch.stack(
                [
                    quantize_dequantize(matrix, scales, site.weight, site.group_size, point)
                    for matrix, scales, point in zip(parameter, rounded(f"{name}.{part}_scales"), each, strict=True)
                ]
            )
        if site.activation is not None:
            _quantize_expert_inputs(experts, rounded(f"{name}.activation_scales"))
    for layer, attention in _attentions(copied):
        cache = f"{layer}.self_attn.cache"
        if cache in plan.caches:
            scales = [numbers(f"{cache}.{kind}_scales") for kind in ("key", "value")]
            _quantize_cache(attention, plan.caches[cache].format, *scales)
    return copied


def quantize_dequantize(values: Any, scales: Any, kind: str, group_size: int | None = None, points: Any = None) -> Any:
    """``values`` [N, K] by ``scales`` [N, G] (or anything by one scale), rounded to codes and back, in float64.

    The quotient is float32's, so that a value at the edge of two codes gets the same one everywhere.
    """
    import torch

    if scales.dim():
        group = group_size or values.shape[-1]
        scales = _spread(scales, group, values.shape[-1])
        points = _spread(points.double(), group, values.shape[-1]) if points is not None else None
    low, high = _LOWEST_HIGHEST[kind]
    if kind == "int8" and not scales.dim():
        low = -128  # an activation saturates as QuantizeLinear does
    scaled = values.float() / scales.float()
    if kind == "fp8":
        return (scaled.clamp(low, high).to(torch.float8_e4m3fn).double() * scales.double()).to(values.dtype)
    shift = points if points is not None else torch.zeros(())
    return (((scaled.double().round() + shift).clamp(low, high) - shift) * scales.double()).to(values.dtype)


def _spread(groups: Any, group: int, columns: int) -> Any:
    return groups.repeat_interleave(group, -1)[..., :columns]


def _scales(matrix: Any, scheme: Scheme) -> tuple[Any, Any]:
    """Scales [N, G] by absolute maximum of a matrix [N, K]; of uint4, by its range, and zero points."""
    import torch

    group = scheme.group_size or matrix.shape[-1]
    parts = matrix.double().split(group, -1)
    if scheme.weight != "uint4":
        largest = torch.stack([part.abs().amax(-1) for part in parts], -1)
        return _rounded(largest / _LARGEST[scheme.weight], scheme.dtype), None
    low = torch.stack([part.amin(-1) for part in parts], -1).clamp(max=0)
    high = torch.stack([part.amax(-1) for part in parts], -1).clamp(min=0)
    scales = _rounded((high - low) / 15, scheme.dtype)
    return scales, (-low / scales).round().clamp(0, 15).float()


def _rounded(scales: Any, dtype: str) -> Any:
    import torch

    return scales.to(getattr(torch, dtype)).float()


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    for index, layer in enumerate(model.model.layers):
        yield f"model.layers.{index}", layer


def _feed_forwards(model: Any) -> Iterator[tuple[str, Any]]:
    """Dense parts and shared experts."""
    for name, layer in _layers(model):
        if hasattr(layer.mlp, "gate_proj"):
            yield f"{name}.mlp", layer.mlp
        elif hasattr(layer.mlp, "shared_expert"):
            yield f"{name}.mlp.shared_expert", layer.mlp.shared_expert


def _linear_sites(model: Any) -> Iterator[tuple[str, list[Any]]]:
    for name, layer in _layers(model):
        for kind in "qkvo":
            yield f"{name}.self_attn.{kind}_proj", [getattr(layer.self_attn, f"{kind}_proj")]
    for name, part in _feed_forwards(model):
        yield f"{name}.gate_up_proj", [part.gate_proj, part.up_proj]
        yield f"{name}.down_proj", [part.down_proj]


def _expert_sites(model: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in _layers(model):
        if hasattr(layer.mlp, "experts"):
            yield f"{name}.mlp.experts", layer.mlp.experts


def _attentions(model: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in _layers(model):
        yield name, layer.self_attn


def _smoothing_places(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, layer in _layers(model):
        yield f"{name}.input_layernorm", (model.config.hidden_size,)
        yield f"{name}.post_attention_layernorm", (model.config.hidden_size,)
        yield f"{name}.self_attn.o_proj", (layer.self_attn.v_proj.out_features,)
    for name, part in _feed_forwards(model):
        yield f"{name}.down_proj", (part.down_proj.in_features,)
    for name, experts in _expert_sites(model):
        yield name, (len(experts.down_proj), experts.down_proj.shape[-1])


def _smoothed(model: Any, factors: dict[str, Any]) -> Any:
    """A copy of ``model`` with the factors moved from inputs to weights."""
    import torch

    copied = copy.deepcopy(model)
    copied.set_experts_implementation("eager")  # grouped products know no float64
    with torch.no_grad():
        for name, layer in _layers(copied):
            attention, mlp = layer.self_attn, layer.mlp
            _smooth_norm(
                factors.get(f"{name}.input_layernorm"),
                layer.input_layernorm,
                [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight],
            )
            readers = [mlp.gate_proj.weight, mlp.up_proj.weight] if hasattr(mlp, "gate_proj") else []
            if hasattr(mlp, "experts"):
                readers += [mlp.gate.weight, mlp.experts.gate_up_proj]
            if hasattr(mlp, "shared_expert"):
                shared = mlp.shared_expert
                readers += [shared.gate_proj.weight, shared.up_proj.weight, mlp.shared_expert_gate.weight]
            _smooth_norm(factors.get(f"{name}.post_attention_layernorm"), layer.post_attention_layernorm, readers)
            s = factors.get(f"{name}.self_attn.o_proj")
            if s is not None:
                attention.v_proj.weight *= (1 / s)[:, None]
                if attention.v_proj.bias is not None:
                    attention.v_proj.bias *= 1 / s
                size = attention.head_dim
                repeated = s.reshape(-1, size).repeat_interleave(attention.num_key_value_groups, 0)
                attention.o_proj.weight *= repeated.reshape(-1)
        for name, part in _feed_forwards(copied):
            s = factors.get(f"{name}.down_proj")
            if s is not None:
                part.up_proj.weight *= (1 / s)[:, None]
                part.down_proj.weight *= s
        for name, experts in _expert_sites(copied):
            s = factors.get(name)
            if s is not None:
                experts.gate_up_proj[:, s.shape[1] :] *= (1 / s)[:, :, None]
                experts.down_proj *= s[:, None, :]
    return copied


def _smooth_norm(s: Any, norm: Any, readers: list[Any]) -> None:
    if s is not None:
        norm.weight *= 1 / s
        for weight in readers:
            weight *= s


def _absolute_maxima(model: Any, tokens: Any) -> dict[Any, Any]:
    """Largest absolute input of each linear layer; of experts [1 + E]; of attention (keys [Hk, D], values [Hk])."""
    import torch

    seen: dict[Any, Any] = {}
    handles = []
    for _, modules in _linear_sites(model):
        for module in modules:
            hook = lambda module, inputs: seen.__setitem__(module, inputs[0].abs().max())  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    for _, experts in _expert_sites(model):

        def see(experts: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            both = torch.einsum("tc,erc->etr", x, experts.gate_up_proj)
            gate, up = both.chunk(2, -1)
            hidden = (torch.nn.functional.silu(gate) * up).abs().amax((1, 2))
            seen[experts] = torch.cat([x.abs().max()[None], hidden])

        handles.append(experts.register_forward_pre_hook(see))
    with torch.no_grad():
        past = model(tokens).past_key_values
    for index, (_, attention) in enumerate(_attentions(model)):
        keys, values = past.layers[index].keys, past.layers[index].values
        seen[attention] = (keys.abs().amax((0, 2)), values.abs().amax((0, 2, 3)))
    for handle in handles:
        handle.remove()
    return seen


def _quantize_expert_inputs(experts: Any, scales: Any) -> None:
    """Let ``experts`` quantize their tokens and their activated channels to E4M3, as the plugin does."""
    import torch

    def forward(hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        x = quantize_dequantize(hidden_states, scales[0], "fp8")
        result = torch.zeros_like(hidden_states)
        for expert in range(len(experts.down_proj)):
            token, place = torch.where(top_k_index == expert)
            gate, up = (x[token] @ experts.gate_up_proj[expert].T).chunk(2, -1)
            hidden = quantize_dequantize(torch.nn.functional.silu(gate) * up, scales[1 + expert], "fp8")
            part = hidden @ experts.down_proj[expert].T
            result.index_add_(0, token, part * top_k_weights[token, place, None].double())
        return result

    experts.forward = forward


def _quantize_cache(attention: Any, kind: str, key_scales: Any, value_scales: Any) -> None:
    """Let ``attention`` see only what a cache of 8 bits would give back of its keys and values."""
    import torch

    low, high = (-128, 127) if kind == "int8" else (-448, 448)

    def stored(values: Any, steps: Any) -> Any:
        scaled = (values.float() / steps).clamp(low, high)
        codes = scaled.round() if kind == "int8" else scaled.to(torch.float8_e4m3fn)
        return codes.double() * steps.double()

    class Rounded:
        def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
            return stored(keys, key_scales[None, :, None, :]), stored(values, value_scales[None, :, None, None])

    forward = attention.forward

    def with_cache(*arguments: Any, **given: Any) -> Any:
        given["cache"] = Rounded()
        return forward(*arguments, **given)

    attention.forward = with_cache
