"""What would fit on a device and how fast it could be, before any work: ``qwenforge plan``.

Memory is counted from shapes. Times are rooflines: the larger of bytes over bandwidth and operations over the dense
rate. Real engines are slower. Everything that is an assumption and not a count is a named constant here.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenforge.devices import GB, Device
from qwenforge.engine.planning.model_size import (
    Parameters,
    attention_operations,
    cache_bytes_per_token,
    count_parameters,
    experts_read,
    matrix_operations,
)
from qwenforge.engine.planning.recipes import RECIPES, STORED, Recipe, stored_recipe
from qwenforge.errors import UnsupportedError, UserError
from qwenforge.exporter.config import ModelConfig
from qwenforge.exporter.prequantized.format import Format

CONTEXT_BYTES = 0.6 * GB
"""CUDA context and loaded kernels on a device."""
SYSTEM_BYTES = 1.5 * GB
"""What a headless Linux takes of a memory that CPU and GPU share."""
EXPORT_FIXED_BYTES = 1_200_000_000
"""An export's memory besides twice its largest tensor."""
BUILDER_BYTES = 3 * GB
"""A TensorRT builder's own memory, kernels and tactics included; an estimate."""
BUILD_COPIES = 3
"""Copies of the weights while an engine is built: as parsed, in the builder's form, serialized (TensorRT for RTX)."""
PREFILL_TOKENS = 2048
"""Tokens of a prefill step that the workspace is sized for."""
DEVICE_COUNTS = {"datacenter": (1, 2, 4, 8, 16), "geforce": (1, 2, 4), "jetson": (1,)}
"""How many devices a plan considers; weights and cache are split evenly, and communication is not counted."""
_CACHE_BYTES = {"fp16": 2.0, "fp8": 1.0, "int8": 1.0}


@dataclass(frozen=True)
class Workload:
    """What is asked of the engine.

    Attributes:
        max_length: tokens of a row, answer included: the cache's capacity.
        max_batch: rows.
        prompt_tokens: length of the prompt that TTFT is of.
        cache: type of keys and values: ``fp16``, ``fp8`` or ``int8``.
    """

    max_length: int
    max_batch: int = 1
    prompt_tokens: int = 512
    cache: str = "fp16"


@dataclass(frozen=True)
class Roofline:
    """The shortest time of a step and what bounds it: ``memory bandwidth`` or ``arithmetic``."""

    seconds: float
    limit: str


@dataclass(frozen=True)
class RecipePlan:
    """What a recipe needs on the device.

    Attributes:
        recipe: which.
        weight_bytes, cache_bytes, workspace_bytes: in all, over all devices.
        devices: how many it takes, the weights and the cache split evenly; 0 when it does not fit at all.
        device_bytes: on each of them.
        build_bytes_constants, build_bytes_inputs: host memory to build an engine with its weights inside, or as inputs.
        ttft: the first token of a full batch of prompts.
        itl: each further token of a full batch, at the end of the longest row.
    """

    recipe: Recipe
    weight_bytes: float
    cache_bytes: float
    workspace_bytes: float
    devices: int
    device_bytes: float
    build_bytes_constants: float
    build_bytes_inputs: float
    ttft: Roofline
    itl: Roofline


@dataclass(frozen=True)
class Plan:
    """Every recipe that the device can use, and the one that we would choose.

    Attributes:
        parameters: of the model.
        usable_bytes: memory of one device that a model can have.
        export_bytes: host memory of an export, verification included.
        recipes: in the order of :data:`~qwenforge.engine.planning.recipes.RECIPES`, or what a quantized checkpoint is.
        refused: why, for the recipes that the device cannot use.
        chosen: the recipe, or None when nothing fits.
        reason: for the choice, one sentence.
        lowering: the operators that attention and experts would become, one sentence.
    """

    device: Device
    tensorrt: str
    workload: Workload
    parameters: Parameters
    usable_bytes: float
    export_bytes: float
    recipes: tuple[RecipePlan, ...]
    refused: dict[str, str]
    chosen: RecipePlan | None
    reason: str
    lowering: str


def make_plan(
    config: ModelConfig,
    device: Device,
    workload: Workload,
    *,
    tensorrt: str | None = None,
    stored: Format | None = None,
) -> Plan:
    """Plan ``config`` on ``device``; ``stored`` says how the checkpoint is quantized already, if it is.

    Raises:
        UserError: the workload is longer than the model's context, or the prompt than the workload.
        UnsupportedError: the device does not run this TensorRT, cannot hold the cache's type or use the stored weights.
    """
    _check(config, device, workload)
    version = device.require_tensorrt(tensorrt)
    parameters = count_parameters(config)
    usable = _usable_bytes(device)
    plans, refused = [], {}
    if stored is not None:
        device.require_precision(stored_recipe(stored).weight)
    for recipe in RECIPES if stored is None else (stored_recipe(stored),):
        try:
            device.require_precision(recipe.weight)
        except UnsupportedError as error:
            refused[recipe.name] = str(error)
            continue
        plans.append(_plan_recipe(config, parameters, device, workload, recipe, usable))
    chosen, reason = _choose(plans, device, usable)
    return Plan(
        device=device,
        tensorrt=version,
        workload=workload,
        parameters=parameters,
        usable_bytes=usable,
        export_bytes=EXPORT_FIXED_BYTES + 2 * parameters.largest * 2.0,
        recipes=tuple(plans),
        refused=refused,
        chosen=chosen,
        reason=reason,
        lowering=_lowering(config, device, version, workload.cache),
    )


def _check(config: ModelConfig, device: Device, workload: Workload) -> None:
    limit = config.max_position_embeddings
    if workload.max_length > limit:
        raise UserError(f"--max-length {workload.max_length} is beyond the model's {limit} positions.")
    if workload.prompt_tokens > workload.max_length:
        raise UserError(
            f"--prompt-tokens {workload.prompt_tokens} is more than --max-length {workload.max_length} leaves room for."
        )
    if workload.cache == "fp8":
        device.require_precision("fp8")


def _usable_bytes(device: Device) -> float:
    return device.memory_bytes - CONTEXT_BYTES - (SYSTEM_BYTES if device.unified_memory else 0.0)


def _plan_recipe(
    config: ModelConfig, parameters: Parameters, device: Device, workload: Workload, recipe: Recipe, usable: float
) -> RecipePlan:
    weights = recipe.weight_bytes(parameters)
    per_token = cache_bytes_per_token(config, _CACHE_BYTES[workload.cache])
    cache = per_token * workload.max_length * workload.max_batch
    workspace = _workspace_bytes(config, workload)
    counts = DEVICE_COUNTS[device.family]
    count = next((n for n in counts if (weights + cache) / n + workspace <= usable), 0)
    split = max(count, 1)
    return RecipePlan(
        recipe=recipe,
        weight_bytes=weights,
        cache_bytes=cache,
        workspace_bytes=workspace,
        devices=count,
        device_bytes=(weights + cache) / split + workspace,
        build_bytes_constants=BUILDER_BYTES + BUILD_COPIES * weights / split,
        build_bytes_inputs=BUILDER_BYTES + 2 * parameters.largest * 2.0,
        ttft=_prefill(config, parameters, device, workload, recipe, split),
        itl=_decode(config, parameters, device, workload, recipe, split),
    )


def _workspace_bytes(config: ModelConfig, workload: Workload) -> float:
    """Activations of a prefill step in 16 bits (residual, normed, packed QKV, widest feed-forward) and fp32 logits."""
    tokens = min(PREFILL_TOKENS, workload.prompt_tokens * workload.max_batch)
    routed = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    inner = 3 * max(config.intermediate_size, routed)
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return tokens * (4 * config.hidden_size + qkv + inner) * 2.0 + workload.max_batch * config.vocab_size * 4.0


def _prefill(
    config: ModelConfig, parameters: Parameters, device: Device, workload: Workload, recipe: Recipe, devices: int
) -> Roofline:
    rows, length = workload.max_batch, workload.prompt_tokens
    matrices = matrix_operations(config, parameters, rows * length, rows)
    attention = attention_operations(config, rows, length, 0)
    arithmetic = matrices / device.rates[recipe.arithmetic] + attention / device.rates["bf16"]
    touched = experts_read(config, rows * length)
    read = recipe.bytes_read(parameters, touched, rows * length * config.hidden_size)
    return _roofline(arithmetic / devices, read / device.bandwidth / devices)


def _decode(
    config: ModelConfig, parameters: Parameters, device: Device, workload: Workload, recipe: Recipe, devices: int
) -> Roofline:
    rows, past = workload.max_batch, workload.max_length - 1
    matrices = matrix_operations(config, parameters, rows, rows)
    attention = attention_operations(config, rows, 1, past)
    arithmetic = matrices / device.rates[recipe.arithmetic] + attention / device.rates["bf16"]
    read = decode_bytes(config, parameters, workload, recipe)
    return _roofline(arithmetic / devices, read / device.bandwidth / devices)


def decode_bytes(config: ModelConfig, parameters: Parameters, workload: Workload, recipe: Recipe) -> float:
    """Bytes that the last step of a full batch reads: the weights its tokens need, and the whole cache."""
    rows = workload.max_batch
    read = recipe.bytes_read(parameters, experts_read(config, rows), rows * config.hidden_size)
    return read + cache_bytes_per_token(config, _CACHE_BYTES[workload.cache]) * rows * workload.max_length


def _roofline(arithmetic: float, memory: float) -> Roofline:
    return Roofline(arithmetic, "arithmetic") if arithmetic > memory else Roofline(memory, "memory bandwidth")


def _choose(plans: list[RecipePlan], device: Device, usable: float) -> tuple[RecipePlan | None, str]:
    """On the fewest devices, the most exact recipe."""
    fitting = [plan for plan in plans if plan.devices]
    if not fitting:
        smallest = min(plans, key=lambda plan: plan.weight_bytes + plan.cache_bytes)
        most = DEVICE_COUNTS[device.family][-1]
        need = (smallest.weight_bytes + smallest.cache_bytes) / GB
        return None, (
            f"nothing fits: even {smallest.recipe.name} takes {need:.1f} GB of weights and cache, and "
            f"{most} x {device.name} have {most * usable / GB:.1f} GB; ask for a shorter --max-length, a smaller "
            "--max-batch or a larger device"
        )
    fewest = min(plan.devices for plan in fitting)
    chosen = next(plan for plan in fitting if plan.devices == fewest)
    where = "one device" if fewest == 1 else f"{fewest} devices, the fewest that any recipe takes"
    if chosen.recipe.name == STORED:
        return chosen, f"{chosen.recipe.summary} fit on {where}"
    skipped = [
        plan.recipe.name for plan in fitting if plan.devices > fewest and plans.index(plan) < plans.index(chosen)
    ]
    more = f"; {', '.join(skipped)} would take more" if skipped else ""
    return chosen, f"{chosen.recipe.name} is the most exact recipe that fits on {where}{more}"


def _lowering(config: ModelConfig, device: Device, tensorrt: str, cache: str) -> str:
    modern = int(tensorrt.split(".")[0]) >= 11
    if not modern:
        attention = f"attention as the plugin QwenForgeAttention, because TensorRT {tensorrt} has no cache layers"
    elif cache != "fp16":
        attention = "attention as the plugin QwenForgeAttention, because TensorRT's own cache is 16-bit only"
    else:
        attention = "attention as TensorRT's own RotaryEmbedding, TensorScatter and Attention"
    if not config.num_experts:
        return attention
    if modern and device.native_moe:
        return f"{attention}; experts as the plugin QwenForgeMoE, or on request as TensorRT's own layer"
    return f"{attention}; experts as the plugin QwenForgeMoE, because TensorRT's own layer needs SM 100, 103 or 110"
