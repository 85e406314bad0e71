"""Graphs of tiny Qwen models made by other people's exporters, for the passes to prove themselves on.

Each takes some seconds to trace, so that it is kept in a folder of the system's temporary directory, keyed by its
description and the versions of the tools; :func:`foreign_model` returns a fresh copy every time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from qwenforge.exporter.cache_argument import cache_argument

Exporter = Literal["onnx_exporter_prefill", "onnx_exporter_decode", "dynamo_prefill", "dynamo_cache", "dynamo_flat"]
"""``onnx_exporter_*``: ``transformers.exporters.OnnxExporter.export_for_generation``'s two graphs.
``dynamo_*``: plain ``torch.onnx.export(dynamo=True)`` of a prefill, of the unmodified model with a ``DynamicCache``
among its inputs (outputs keep their fx names, caches come as k0, k1, v0, v1), and of a wrapper with flat, named caches
(k0, v0, k1, v1)."""

BATCH, PAST, NEW = 2, 5, 3


@dataclass(frozen=True)
class ForeignGraph:
    """What to export: ``kind`` dense (qwen2), moe (qwen2_moe), qwen3 or qwen3_moe."""

    kind: Literal["dense", "moe", "qwen3", "qwen3_moe"] = "dense"
    exporter: Exporter = "dynamo_flat"
    attention: Literal["eager", "sdpa"] = "eager"
    experts: Literal["batched_mm", "grouped_mm"] = "batched_mm"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    opset: int = 20
    masked: bool = True
    """Whether the graph takes an attention mask (OnnxExporter drops a mask of ones)."""
    multi_token_decode: bool = True
    """Whether OnnxExporter's decode graph takes several tokens (its default form takes one)."""
    static: bool = False
    """Whether the sizes of the example (batch 2, past 5, 3 new tokens) are frozen in the graph (dynamo_* only)."""
    config: tuple[tuple[str, Any], ...] = ()
    """Fields of the configuration to change."""

    def __str__(self) -> str:
        """A short test id."""
        experts = (self.experts,) if "moe" in self.kind else ()
        flags = (("nomask",) if not self.masked else ()) + (("static",) if self.static else ())
        parts = (self.kind, self.exporter, self.attention, *experts, self.dtype, str(self.opset), *flags)
        return "-".join(parts)


def foreign_model(graph: ForeignGraph) -> ir.Model:
    """A fresh copy of the exported graph, its weights in memory."""
    path = _folder() / f"{graph}-{hashlib.sha256(repr(graph).encode()).hexdigest()[:12]}.onnx"
    if not path.is_file():
        _export_to(graph, path)
    return ir.load(path)


def tiny_transformers_model(graph: ForeignGraph) -> Any:
    """The seeded ``transformers`` model behind ``graph``: 2 layers, 4 query and 2 key/value heads of 8."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = {"dense": "qwen2", "moe": "qwen2_moe"}.get(graph.kind, graph.kind)
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": "moe" not in graph.kind,
    }
    if "moe" in graph.kind:
        sizes |= {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False}
        sizes |= {"shared_expert_intermediate_size": 32} if graph.kind == "moe" else {}
    dtype = getattr(torch, graph.dtype)
    config = AutoConfig.for_model(model_type, **(sizes | dict(graph.config)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=graph.attention, dtype=dtype).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.requires_grad_(False)
    if "moe" in graph.kind:
        model.set_experts_implementation(graph.experts)
    return model


def _folder() -> Path:
    tools = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxscript", "onnx-ir")}
    key = hashlib.sha256((repr(tools) + Path(__file__).read_text()).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"qwenforge-foreign-graphs-{os.getuid()}-{key}"
    folder.mkdir(exist_ok=True)
    return folder


def _export_to(graph: ForeignGraph, path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # the exporters report their progress with print
        if graph.exporter.startswith("onnx_exporter"):
            components = _export_for_generation(graph)
            model = components[graph.exporter.removeprefix("onnx_exporter_")]
        else:
            model = _export_with_dynamo(graph)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        ir.save(model, Path(scratch) / path.name)
        os.replace(Path(scratch) / path.name, path)


def _export_for_generation(graph: ForeignGraph) -> dict[str, ir.Model]:
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    tokens = torch.arange(BATCH * PAST).reshape(BATCH, PAST) + 1
    mask = torch.ones(BATCH, PAST, dtype=torch.long)
    if graph.masked:
        mask[0, :2] = 0
    exported = OnnxExporter().export_for_generation(
        tiny_transformers_model(graph),
        {"input_ids": tokens, "attention_mask": mask},
        OnnxConfig(dynamic=True, opset_version=graph.opset),
        multi_token_decode=graph.multi_token_decode,
    )
    return {name: component.program for name, component in exported.components.items()}


def _export_with_dynamo(graph: ForeignGraph) -> ir.Model:
    import torch

    model = tiny_transformers_model(graph)
    past = 0 if graph.exporter == "dynamo_prefill" else PAST
    arguments: dict[str, Any] = {"input_ids": torch.ones(BATCH, NEW, dtype=torch.long)}
    if graph.masked:
        arguments["attention_mask"] = torch.ones(BATCH, past + NEW, dtype=torch.long)
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    cache = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    names: dict[str, list[str]] = {}
    layers = model.config.num_hidden_layers
    if past:
        arguments["position_ids"] = torch.arange(past, past + NEW).repeat(BATCH, 1)
    shapes: dict[str, Any] = dict.fromkeys(arguments, both)
    target = _flat_wrapper(model)
    if graph.exporter == "dynamo_flat":
        arguments["past"] = [_empty_cache(model) for _ in range(2 * layers)]
        shapes["past"] = [cache] * (2 * layers)
        flat = [f"{layer}.{role}" for layer in range(layers) for role in ("key", "value")]
        names["input_names"] = [name for name in arguments if name != "past"]
        names["input_names"] += [f"past_key_values.{name}" for name in flat]
        names["output_names"] = ["logits", *(f"present.{name}" for name in flat)]
    elif graph.exporter == "dynamo_cache":
        tensors = [_empty_cache(model) for _ in range(2 * layers)]
        arguments[cache_argument(model)] = _cache_class().of(tensors[:layers], tensors[layers:])
        shapes[cache_argument(model)] = [[cache] * layers] * 2
        target = model
    program = torch.onnx.export(
        target,
        (),
        kwargs=arguments,
        dynamo=True,
        opset_version=graph.opset,
        dynamic_shapes=None if graph.static else shapes,
        verbose=False,
        **names,
    )
    assert program is not None
    return program.model


def _empty_cache(model: Any) -> Any:
    import torch

    config = model.config
    return torch.zeros(BATCH, config.num_key_value_heads, PAST, config.head_dim, dtype=model.dtype)


@functools.cache
def _cache_class() -> Any:
    """A DynamicCache that torch.export sees as {key_cache: [...], value_cache: [...]}, as transformers' own
    ``register_dynamic_cache_export_support`` shows it. A class of its own, because OnnxExporter registers
    DynamicCache otherwise for the whole process, and built without ``update``: torch 2.13 cannot lift the empty
    tensors that ``update`` starts a layer with when the cache is an input."""
    import torch
    import torch.utils._pytree as pytree
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class ListedCache(DynamicCache):
        @classmethod
        def of(cls, keys: list[Any], values: list[Any]) -> DynamicCache:
            cache = cls()
            for key, value in zip(keys, values, strict=True):
                layer = DynamicLayer()
                layer.keys, layer.values, layer.is_initialized = key, value, True
                if isinstance(key, torch.Tensor):
                    layer.dtype, layer.device = key.dtype, key.device
                cache.layers.append(layer)
            return cache

        def lists(self) -> dict[str, list[Any]]:
            return {
                "key_cache": [layer.keys for layer in self.layers],
                "value_cache": [layer.values for layer in self.layers],
            }

    def restore(values: Any, context: Any) -> DynamicCache:
        tree = pytree._dict_unflatten(values, context)
        return ListedCache.of(tree["key_cache"], tree["value_cache"])

    pytree.register_pytree_node(
        ListedCache,
        lambda cache: pytree._dict_flatten(cache.lists()),
        restore,
        serialized_type_name="qwenforge.tests.ListedCache",
        flatten_with_keys_fn=lambda cache: pytree._dict_flatten_with_keys(cache.lists()),
    )
    return ListedCache


def _flat_wrapper(model: Any) -> Any:
    import torch
    from transformers.cache_utils import DynamicCache

    class FlatCaches(torch.nn.Module):
        """The model with its caches as a list k0, v0, k1, v1 and a tuple of outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, past: Any = ()
        ) -> tuple[Any, ...]:
            cache = DynamicCache(config=self.model.config)
            argument = cache_argument(self.model)
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                **{argument: cache},
            )
            caches = [tensor for layer in getattr(output, argument).layers for tensor in (layer.keys, layer.values)]
            return (output.logits, *caches)

    return FlatCaches().eval()


def variants(graph: ForeignGraph, **choices: tuple[Any, ...]) -> list[ForeignGraph]:
    """``graph`` with every combination of the given fields."""
    result = [graph]
    for field, values in choices.items():
        result = [dataclasses.replace(each, **{field: value}) for each in result for value in values]
    return result
