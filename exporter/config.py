"""The architecture a checkpoint's ``config.json`` describes, as transformers understands it.

Every field that changes the numbers is read, with transformers' default when it is absent; every other field is
either known to be harmless or refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from qwenforge.errors import CheckpointError, UnsupportedError
from qwenforge.exporter.checkpoint_files import read_json_object
from qwenforge.exporter.config_fields import BOOKKEEPING, Fields, check_values
from qwenforge.exporter.rotary import RotaryConfig, read_rotary

ModelType = Literal["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]

_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_DTYPES = ("float32", "float16", "bfloat16")
_LARGEST_EPSILON = 1e-2
"""Above it an addend to a mean of squares is no guard against zero; the fusion of RMSNorm has the same limit."""
_SHORTEST_CONTEXT = 16
"""A bundle is verified on prompts and answers of some tokens."""
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class _Defaults:
    """transformers' defaults that differ between the model types."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    moe_intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    head_dim: int | None = None


_DEFAULTS: dict[str, _Defaults] = {
    "qwen2": _Defaults(4096, 32, 32, 32, 22016),
    "qwen2_moe": _Defaults(2048, 24, 16, 16, 5632, 1408, 60, 4),
    "qwen3": _Defaults(4096, 32, 32, 32, 22016, head_dim=128),
    "qwen3_moe": _Defaults(2048, 24, 32, 4, 6144, 768, 128, 8),
}


@dataclass(frozen=True)
class LayerKind:
    """What distinguishes one decoder layer from another of the same model.

    Attributes:
        sparse: Whether its feed-forward is a mixture of experts.
        sliding_window: A query at position p sees keys above p - sliding_window; None sees all.
    """

    sparse: bool
    sliding_window: int | None


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen2 or Qwen3 architecture, dense or mixture of experts; field names are those of config.json.

    Attributes:
        head_dim: Size of one attention head, given or derived.
        qkv_bias: Whether the q, k and v projections have a bias.
        output_bias: Whether the o projection has a bias.
        qk_norm: Whether q and k heads are normalized (Qwen3).
        num_experts: 0 for a dense model; the other expert fields then are 0 too.
        shared_expert_intermediate_size: 0 when there is no shared expert.
        dtype: The dtype config.json declares, None when it does not; the tensors' own dtypes are in their headers.
        source: The parsed config.json.
        decisive: Those of its fields that decide the numbers.
    """

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    rotary: RotaryConfig
    layer_kinds: tuple[LayerKind, ...]
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    hidden_act: str = "silu"
    dtype: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    decisive: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read a ``config.json`` file.

        Raises:
            CheckpointError: The file is absent, is not JSON, or a field has an impossible value.
            UnsupportedError: A field asks for something this project does not do.
        """
        if not path.exists():
            raise CheckpointError(f"{path} is missing: give a Hugging Face checkpoint folder")
        return cls.parse(read_json_object(path), where=str(path))

    @classmethod
    def parse(cls, values: Any, *, where: str = "config.json") -> ModelConfig:
        """Build from the parsed content of ``config.json``; raises as :meth:`read` does."""
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where} must hold a JSON object: download it again")
        check_values(values, where)
        fields = Fields(values, where)
        model_type = _read_model_type(fields)
        defaults = _DEFAULTS[model_type]
        moe = model_type.endswith("_moe")
        if fields.has("hidden_act") and fields.raw("hidden_act") != "silu":
            raise fields.refuse("hidden_act", "only 'silu' is supported")
        layers = fields.integer("num_hidden_layers", defaults.num_hidden_layers, at_most=1024)
        hidden = fields.integer("hidden_size", defaults.hidden_size)
        heads = fields.integer("num_attention_heads", defaults.num_attention_heads)
        positions = fields.integer("max_position_embeddings", 32768, at_least=_SHORTEST_CONTEXT)
        experts = _read_experts(fields, model_type, defaults) if moe else _no_experts(fields)
        sparse = _read_sparse_layers(fields, layers, experts["num_experts"] if moe else 0)
        windows = _read_sliding_windows(fields, model_type, layers)
        attention_bias = fields.boolean("attention_bias", False)
        qkv_bias = fields.boolean("qkv_bias", True)
        config = cls(
            model_type=model_type,
            vocab_size=fields.integer("vocab_size", 151936),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_read_key_value_heads(fields, model_type, heads, defaults),
            head_dim=_read_head_dim(fields, hidden, heads, defaults.head_dim),
            intermediate_size=fields.integer("intermediate_size", defaults.intermediate_size),
            max_position_embeddings=positions,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6, at_least=1e-30, at_most=_LARGEST_EPSILON),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            # transformers gives Qwen2's projections their biases whatever config.json says.
            qkv_bias={"qwen2": True, "qwen2_moe": qkv_bias}.get(model_type, attention_bias),
            output_bias=model_type.startswith("qwen3") and attention_bias,
            qk_norm=model_type.startswith("qwen3"),
            rotary=read_rotary(fields, positions),
            layer_kinds=tuple(LayerKind(s, w) for s, w in zip(sparse, windows, strict=True)),
            dtype=_read_dtype(fields),
            eos_token_ids=fields.tokens("eos_token_id"),
            bos_token_id=fields.token("bos_token_id"),
            pad_token_id=fields.token("pad_token_id"),
            source=dict(values),
            **experts,
        )
        # How weights are stored, not what they are: exporter.prequantized reads it.
        fields.finish(BOOKKEEPING | {"quantization_config"})
        return replace(config, decisive=fields.decisive)

    def to_transformers(self) -> Any:
        """transformers' own configuration object, built from the fields of config.json that decide the numbers.

        Only embeddings may be untied. The other fields stay behind: transformers refuses or warns of some values that
        mean nothing here, and "return_dict" changes what its modules return.
        """
        from transformers import AutoConfig

        values = copy.deepcopy(dict(self.decisive))
        values["tie_word_embeddings"] = self.tie_word_embeddings
        return AutoConfig.for_model(self.model_type, **values)


def _read_model_type(fields: Fields) -> ModelType:
    model_type = fields.raw("model_type")
    for supported in get_args(ModelType):
        if model_type == supported:
            break
    else:
        raise UnsupportedError(
            f"{fields.where}: 'model_type' is {model_type!r}; supported are {', '.join(get_args(ModelType))}"
        )
    architectures = fields.raw("architectures") or [_ARCHITECTURES[supported]]
    if architectures != [_ARCHITECTURES[supported]]:
        raise fields.refuse("architectures", f"only causal language models ({_ARCHITECTURES[supported]}) are supported")
    result: ModelType = supported
    return result


def _read_key_value_heads(fields: Fields, model_type: str, heads: int, defaults: _Defaults) -> int:
    if (
        fields.has("num_key_value_heads")
        and fields.raw("num_key_value_heads") is None
        and not model_type.endswith("moe")
    ):
        return heads
    key_value_heads = fields.integer("num_key_value_heads", defaults.num_key_value_heads)
    if heads % key_value_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({heads})")
    return key_value_heads


def _read_head_dim(fields: Fields, hidden: int, heads: int, default: int | None) -> int:
    if default is None and not fields.has("head_dim") and hidden % heads:
        raise CheckpointError(
            f"{fields.where}: 'hidden_size' {hidden} is no multiple of 'num_attention_heads' {heads} and 'head_dim' "
            "is absent; correct the file"
        )
    head_dim = fields.integer("head_dim", default or hidden // heads)
    if head_dim % 2:
        raise CheckpointError(
            f"{fields.where}: the head size {head_dim} is odd, which rotary embeddings do not allow; correct the file"
        )
    return head_dim


def _read_experts(fields: Fields, model_type: str, defaults: _Defaults) -> dict[str, Any]:
    name, other = "num_experts", "num_local_experts"
    if fields.has(other) and model_type == "qwen3_moe":
        if fields.has(name) and fields.raw(name) != fields.raw(other):
            raise fields.error(other, f"contradicts 'num_experts' ({fields.raw(name)})")
        name = other
    count = fields.integer(name, defaults.num_experts, at_least=0, at_most=1024)
    chosen = fields.integer("num_experts_per_tok", defaults.num_experts_per_tok)
    if count and chosen > count:
        raise fields.error("num_experts_per_tok", f"must not exceed the number of experts ({count})")
    return {
        "num_experts": count,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": fields.integer("moe_intermediate_size", defaults.moe_intermediate_size),
        "shared_expert_intermediate_size": (
            fields.integer("shared_expert_intermediate_size", 5632) if model_type == "qwen2_moe" else 0
        ),
        "norm_topk_prob": fields.boolean("norm_topk_prob", False),
    }


def _no_experts(fields: Fields) -> dict[str, Any]:
    for name in ("num_experts", "num_local_experts"):
        if fields.raw(name):
            raise fields.refuse(name, "a dense model type has no experts; use the matching _moe model type")
    return {}


def _read_sparse_layers(fields: Fields, layers: int, experts: int) -> list[bool]:
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.raw("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < layers for i in dense):
        raise fields.error("mlp_only_layers", f"must be a list of layer numbers below {layers}")
    return [experts > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]


def _read_sliding_windows(fields: Fields, model_type: str, layers: int) -> list[int | None]:
    """Each layer's window, decided as transformers' configuration and modeling code of that model type decide it."""
    used = fields.boolean("use_sliding_window", False)
    null = fields.has("sliding_window") and fields.raw("sliding_window") is None
    given_window = None if null else fields.integer("sliding_window", 4096, at_least=1 if used else 0)
    window = given_window if used else None
    first = fields.integer("max_window_layers", 28, at_least=0)
    if model_type == "qwen3_moe":
        types = [_FULL if window is None else _SLIDING] * layers
    elif model_type == "qwen2_moe":
        types = [_SLIDING if used and i % 2 == 0 and i < first else _FULL for i in range(layers)]
    else:
        types = [_SLIDING if window is not None and i >= first else _FULL for i in range(layers)]
    given = fields.raw("layer_types")
    if given is not None:
        if not isinstance(given, list) or len(given) != layers:
            raise fields.error("layer_types", f"must list one type for each of the {layers} layers")
        given = [_FULL if kind == "attention" else kind for kind in given]
        unknown = [kind for kind in given if kind not in (_FULL, _SLIDING)]
        if unknown:
            raise fields.refuse("layer_types", f"layers of type {unknown[0]!r} are not supported")
        if model_type == "qwen3_moe" and given != types:
            raise fields.refuse("layer_types", "transformers' qwen3_moe has no layer types; use 'sliding_window' alone")
        types = given
    if _SLIDING in types and window is None:
        raise fields.error("layer_types", "has sliding layers, so use_sliding_window and sliding_window must be set")
    return [window if kind == _SLIDING else None for kind in types]


def _read_dtype(fields: Fields) -> str | None:
    name = "dtype" if fields.raw("dtype") is not None else "torch_dtype"
    dtype = fields.raw(name)
    if dtype is not None and dtype not in _DTYPES:
        raise fields.refuse(name, f"only {', '.join(_DTYPES)} are supported")
    return None if dtype is None else str(dtype)
