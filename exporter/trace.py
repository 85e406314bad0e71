"""Trace transformers' own modeling code to ONNX without loading a weight.

The model is built on the meta device with *one layer of each kind* (dense or sparse, full or sliding attention), so
tracing takes the same seconds for 2 layers as for 80; ``exporter.instantiate`` copies the fused layers to full depth
afterwards. Modeling code is used as it is: the only choices made here are configuration that transformers offers
(attention and expert implementations that ``torch.export`` can follow).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qwenforge import names
from qwenforge.exporter.cache_argument import cache_argument
from qwenforge.exporter.checkpoint import Checkpoint, sealed
from qwenforge.exporter.config import LayerKind, ModelConfig
from qwenforge.exporter.weights import cast

if TYPE_CHECKING:
    import torch

OPSET = 24
ATTENTION_MASK = "attention_mask"
_EXAMPLE_BATCH, _EXAMPLE_PAST, _EXAMPLE_NEW = 2, 5, 3
"""Sizes of the example inputs: distinct and above 1, so that torch.export specialises none of them."""


@dataclass(frozen=True)
class TracedModel:
    """Raw ONNX of a model that holds one layer of each kind.

    Attributes:
        model: opset 24 graph, growing cache (present = concat(past, new)); initializers are lazy.
        template_of_layer: for each layer of the checkpoint, the index of the traced layer it is a copy of.
        representative: for each traced layer, the checkpoint layer whose weights it carries.
    """

    model: ir.Model
    template_of_layer: tuple[int, ...]
    representative: tuple[int, ...]


def trace(checkpoint: Checkpoint, dtype: ir.DataType) -> TracedModel:
    """Trace ``checkpoint``'s architecture in ``dtype`` and attach its tensors, unread, as initializers."""
    kinds = checkpoint.config.layer_kinds
    distinct = list(dict.fromkeys(kinds))
    template_of_layer = tuple(distinct.index(kind) for kind in kinds)
    representative = tuple(kinds.index(kind) for kind in distinct)
    model = _trace_meta_model(checkpoint.config, distinct, dtype)
    _attach_weights(model, checkpoint, representative)
    return TracedModel(model, template_of_layer, representative)


def template_config(config: ModelConfig, kinds: list[LayerKind]) -> Any:
    """The transformers configuration of a model that has exactly one layer of each of ``kinds``, in that order."""
    short = copy.deepcopy(config.to_transformers())
    short.num_hidden_layers = len(kinds)
    short.layer_types = ["full_attention" if kind.sliding_window is None else "sliding_attention" for kind in kinds]
    if config.num_experts:
        short.decoder_sparse_step = 1
        short.mlp_only_layers = [index for index, kind in enumerate(kinds) if not kind.sparse]
    return short


def _trace_meta_model(config: ModelConfig, kinds: list[LayerKind], dtype: ir.DataType) -> ir.Model:
    import torch
    from transformers import AutoModelForCausalLM

    torch_dtype = {
        ir.DataType.FLOAT: torch.float32,
        ir.DataType.FLOAT16: torch.float16,
        ir.DataType.BFLOAT16: torch.bfloat16,
    }[dtype]
    short = template_config(config, kinds)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(short, attn_implementation="sdpa", dtype=torch_dtype).eval()
    if config.num_experts:
        model.set_experts_implementation("batched_mm")

    def empty(*shape: int, kind: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(*shape, dtype=kind, device="meta")

    batch, past, new = _EXAMPLE_BATCH, _EXAMPLE_PAST, _EXAMPLE_NEW
    cache_shape = (batch, config.num_key_value_heads, past, config.head_dim)
    caches = [empty(*cache_shape, kind=torch_dtype) for _ in range(2 * len(kinds))]
    dynamic = torch.export.Dim.DYNAMIC
    with _quiet():
        program = torch.onnx.export(
            _with_flat_cache(model),
            (empty(batch, new), empty(batch, past + new), empty(batch, new), caches),
            dynamic_shapes=(*[{0: dynamic, 1: dynamic}] * 3, [{0: dynamic, 2: dynamic}] * len(caches)),
            input_names=[names.INPUT_IDS, ATTENTION_MASK, names.POSITION_IDS, *_cache_names(len(kinds), past=True)],
            output_names=[names.LOGITS, *_cache_names(len(kinds), past=False)],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    traced: ir.Model = program.model
    _set_constant_buffers(traced, model, short)
    return traced


def _cache_names(layers: int, *, past: bool) -> list[str]:
    key, value = (names.past_key, names.past_value) if past else (names.present_key, names.present_value)
    return [name(layer) for layer in range(layers) for name in (key, value)]


def _with_flat_cache(model: Any) -> torch.nn.Module:
    """A module that takes and returns the cache as plain tensors, for ``torch.export``'s signature."""
    import torch
    from transformers import DynamicCache

    argument = cache_argument(model)

    class FlatCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.traced = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past: list[torch.Tensor],
        ) -> tuple[torch.Tensor, ...]:
            # Without a config every layer's cache keeps all keys; the mask alone expresses a sliding window.
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            output = self.traced(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                **{argument: cache},
            )
            present = [tensor for layer in getattr(output, argument).layers for tensor in (layer.keys, layer.values)]
            return (output.logits, *present)

    return FlatCache().eval()


def _set_constant_buffers(traced: ir.Model, model: Any, config: Any) -> None:
    """Give the rotary frequencies, the only constants a meta model lacks, their values; drop the wrapper's prefix."""
    rotary = type(model.model.rotary_emb)(config)
    for value in list(traced.graph.initializers.values()):
        assert value.name is not None
        if not value.name.startswith("traced."):
            continue
        name = value.name.removeprefix("traced.")
        value.name = name
        if name.startswith("model.rotary_emb."):
            buffer = getattr(rotary, name.removeprefix("model.rotary_emb."))
            value.const_value = ir.tensor(buffer.numpy(), name=name)
        else:
            # No value yet: constant folding must not touch a weight.
            value.const_value = None
    for node in traced.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes.replace("'traced.", "'")


def _attach_weights(model: ir.Model, checkpoint: Checkpoint, representative: tuple[int, ...]) -> None:
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        tensor = sealed(checkpoint.state_tensor(checkpoint_name(name, representative)))
        assert value.dtype is not None
        if list(tensor.shape) != list(value.shape or ()):
            raise RuntimeError(f"traced initializer {name} is {value.shape}, the checkpoint's tensor {tensor.shape}")
        value.const_value = cast(tensor, value.dtype)


def checkpoint_name(name: str, representative: tuple[int, ...]) -> str:
    """The checkpoint's name of a traced parameter: layer t of the trace is layer ``representative[t]`` there."""
    prefix = "model.layers."
    if not name.startswith(prefix):
        return name
    index, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{representative[int(index)]}.{rest}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter chatter (it logs about packages that are irrelevant here)."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
