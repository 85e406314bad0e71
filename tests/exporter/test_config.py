"""config.json as we read it against config.json as transformers reads it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwenforge.errors import CheckpointError, UnsupportedError
from qwenforge.exporter.config import LayerKind, ModelConfig
from qwenforge.exporter.config_fields import BOOKKEEPING
from qwenforge.exporter.expected_tensors import expected_tensors
from qwenforge.exporter.rotary import RotaryConfig
from support.checkpoints import Kind, make_checkpoint

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
}
KINDS: tuple[Kind, ...] = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

OFFICIAL: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
        "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12,
        "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.44.0", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen1.5-MoE-A2.7B": {
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.39.0.dev0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
        "decoder_sparse_step": 1, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False, "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip


def values(kind: Kind, **fields: Any) -> dict[str, Any]:
    """A small config.json of that model type."""
    small = dict(SMALL)
    if kind != "qwen2_moe":
        del small["shared_expert_intermediate_size"]
    if not kind.endswith("moe"):
        small = {name: value for name, value in small.items() if "expert" not in name and "moe" not in name}
    return {"model_type": kind, **small, **fields}


def parse(kind: Kind, **fields: Any) -> ModelConfig:
    return ModelConfig.parse(values(kind, **fields))


VARIANTS: list[tuple[Kind, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}) for kind in KINDS),
    *((kind, {"sliding_window": 7, "max_window_layers": 0}) for kind in KINDS),
    *((kind, {"head_dim": 10, "num_key_value_heads": 1}) for kind in KINDS),
    ("qwen2", {"num_key_value_heads": None}),
    ("qwen2", {"attention_bias": False, "tie_word_embeddings": True}),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
               "use_sliding_window": True}),
    ("qwen2_moe", {"qkv_bias": False}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ("qwen2_moe", {"mlp_only_layers": [0, 4], "norm_topk_prob": True}),
    ("qwen2_moe", {"num_experts": 0}),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 5, "use_sliding_window": True, "sliding_window": 3}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3_moe", {"attention_bias": True, "decoder_sparse_step": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields"), VARIANTS)
def test_layers_and_tensors_are_those_of_transformers(kind: Kind, fields: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = parse(kind, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config.to_transformers())
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert expected_tensors(config, "stacked") == state
    theirs = tuple(
        LayerKind(sparse=hasattr(layer.mlp, "experts"), sliding_window=getattr(layer.self_attn, "sliding_window", None))
        for layer in model.model.layers
    )
    assert config.layer_kinds == theirs
    assert config.head_dim == model.model.layers[0].self_attn.head_dim
    assert config.rms_norm_eps == model.model.norm.variance_epsilon
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            assert (layer.mlp.gate.top_k, layer.mlp.gate.norm_topk_prob) == (
                config.num_experts_per_tok,
                config.norm_topk_prob,
            )


@pytest.mark.parametrize("kind", KINDS)
def test_absent_fields_take_transformers_defaults(kind: Kind) -> None:
    config = ModelConfig.parse({"model_type": kind})
    theirs = config.to_transformers()
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["intermediate_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "hidden_act"]
    if kind.endswith("moe"):
        names += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
    if kind == "qwen2_moe":
        names += ["shared_expert_intermediate_size", "qkv_bias"]
    assert {name: getattr(config, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.rotary.theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configurations_are_read(name: str) -> None:
    official = OFFICIAL[name]
    config = ModelConfig.parse(official)
    assert config.num_hidden_layers == official["num_hidden_layers"] == len(config.layer_kinds)
    assert config.rotary.theta == official["rope_theta"]
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (official["eos_token_id"],)
    assert all(kind == LayerKind("num_experts" in official, None) for kind in config.layer_kinds)


@pytest.mark.parametrize(("kind", "fields"), [*VARIANTS, ("qwen2", {"rope_scaling": YARN, "rope_theta": 5e5})])
def test_what_transformers_saves_reads_the_same(tmp_path: Path, kind: Kind, fields: dict[str, Any]) -> None:
    config = parse(kind, **fields)
    config.to_transformers().save_pretrained(tmp_path)
    saved = ModelConfig.read(tmp_path / "config.json")
    raw = ("source", "decisive")
    ours = {k: v for k, v in vars(config).items() if k not in raw}
    # transformers saves no window when it is not used, and reads its own files back to the same model.
    assert {k: v for k, v in vars(saved).items() if k not in raw} == ours


ROTARY: list[tuple[dict[str, Any], RotaryConfig]] = [
    ({}, RotaryConfig("default", 1e4)),
    ({"rope_theta": 1000000}, RotaryConfig("default", 1e6)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e5}}, RotaryConfig("default", 2e5)),
    ({"rope_theta": 3e5, "rope_parameters": {"rope_theta": 2e5}}, RotaryConfig("default", 2e5)),
    (
        {"rope_theta": 1e6, "rope_scaling": YARN},
        RotaryConfig("yarn", 1e6, factor=4.0, original_max_position_embeddings=64),
    ),
    (
        {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 1e6, "truncate": False, "beta_fast": 20}},
        RotaryConfig("yarn", 1e6, factor=4.0, original_max_position_embeddings=64, truncate=False, beta_fast=20.0),
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5, "beta_slow": 2}},
        RotaryConfig(
            "yarn", 1e4, factor=2.0, original_max_position_embeddings=32768, attention_factor=1.5, beta_slow=2.0
        ),
    ),
    (
        {"original_max_position_embeddings": 128, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
        RotaryConfig("yarn", 1e4, 4.0, 128, mscale=1.0, mscale_all_dim=0.5),
    ),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, RotaryConfig("linear", 1e4, factor=8.0)),
]


@pytest.mark.parametrize(("fields", "expected"), ROTARY)
def test_rotary_settings_of_both_spellings_match_transformers(fields: dict[str, Any], expected: RotaryConfig) -> None:
    config = parse("qwen2", **fields)
    assert config.rotary == expected
    transformers_config = config.to_transformers()
    transformers_config.standardize_rope_params()  # as its rotary initialization does before reading
    theirs = transformers_config.rope_parameters
    assert (theirs["rope_type"], theirs["rope_theta"]) == (expected.type, expected.theta)
    for name in ("factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"):
        if name in theirs:
            assert getattr(expected, name) == theirs[name], name


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "'model_type' is 'llama'; supported are qwen2, qwen2_moe, qwen3, qwen3_moe"),
    ({"model_type": "qwen2_vl"}, "'model_type' is 'qwen2_vl'"),
    ({"model_type": None}, "'model_type' is None"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "only causal language models"),
    ({"hidden_act": "gelu"}, "'hidden_act' = 'gelu': only 'silu'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary type 'dynamic' is not supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rotary type 'llama3'"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rotary type 'longrope'"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [16]}}, "rotary type 'mrope'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
    ({"rope_scaling": YARN | {"short_factor": [1]}}, "'short_factor' is not supported"),
    ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' = 0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' = 0.5"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "'auto_map' is not supported: the checkpoint brings its own"),
    ({"use_mrope": True}, "'use_mrope' is not supported"),
    ({"dual_chunk_attention_config": {"chunk_size": 4}}, "dual chunk attention"),
    ({"logit_softcapping": 30.0}, "'logit_softcapping' is not supported: this field is unknown"),
    ({"layer_types": ["chunked_attention"] * 5}, "layers of type 'chunked_attention'"),
    ({"num_experts": 4}, "a dense model type has no experts"),
    ({"dtype": "float8_e4m3fn"}, "'dtype' = 'float8_e4m3fn'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_unsupported_settings_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ModelConfig.parse(values("qwen2") | fields)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "32"}, "'hidden_size' must be an integer from 1 .*, not '32'"),
    ({"num_hidden_layers": 0}, "'num_hidden_layers' must be an integer from 1"),
    ({"num_hidden_layers": 10**9}, "'num_hidden_layers' must be an integer from 1 to 1024"),
    ({"num_hidden_layers": True}, "'num_hidden_layers' must be an integer"),
    ({"rms_norm_eps": -1.0}, "'rms_norm_eps' must be a positive number"),
    ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' holds nan, not a finite number"),
    ({"rope_theta": None}, "'rope_theta' must be a positive number"),
    ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' must be true or false"),
    ({"num_key_value_heads": 3}, r"'num_key_value_heads' must divide num_attention_heads \(4\), not 3"),
    ({"hidden_size": 30}, "'hidden_size' 30 is no multiple of 'num_attention_heads' 4"),
    ({"hidden_size": 36}, "head size 9 is odd"),
    ({"head_dim": None}, "'head_dim' must be an integer"),
    ({"rope_scaling": [1]}, "'rope_scaling' must be an object or null"),
    ({"rope_scaling": {"type": "yarn"}}, "yarn needs a 'factor'"),
    ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "'factor' must be a positive number"),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "'original_max_position_embeddings' must be"),
    ({"layer_types": ["full_attention"]}, "'layer_types' must list one type for each of the 5 layers"),
    ({"layer_types": ["sliding_attention"] * 5}, "'layer_types' has sliding layers, so use_sliding_window"),
    ({"eos_token_id": "</s>"}, "'eos_token_id' must be a token number"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_impossible_values_name_their_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.parse(values("qwen2") | fields)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("qwen2_moe", {"num_experts_per_tok": 4}, r"must not exceed the number of experts \(3\), not 4"),
        ("qwen2_moe", {"mlp_only_layers": "all"}, "'mlp_only_layers' must be a list of layer numbers"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' must be an integer from 1"),
        ("qwen2_moe", {"num_key_value_heads": None}, "'num_key_value_heads' must be an integer"),
        ("qwen3_moe", {"num_local_experts": 4}, r"'num_local_experts' contradicts 'num_experts' \(3\)"),
    ],
)
def test_impossible_expert_settings_name_their_field(kind: Kind, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(kind, **fields)


def test_unknown_fields_that_are_off_or_private_are_harmless() -> None:
    config = parse("qwen2", new_feature=None, other=False, third={}, fourth=[], _name_or_path="x", temperature=0.7)
    assert config == parse("qwen2")


def test_unreadable_files_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        ModelConfig.read(path)
    for content in ("{", "", '{"a": ' + "[" * 100_000, "\ud800".encode("utf-16", "surrogatepass").decode("latin-1")):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(CheckpointError, match="cannot be read as JSON"):
            ModelConfig.read(path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        ModelConfig.read(path)


def test_written_checkpoint_configuration_agrees_with_its_source(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2_moe", tokenizer=False, rope_scaling=YARN | {"rope_theta": 5e4})
    config = ModelConfig.read(folder / "config.json")
    assert config.rotary == RotaryConfig("yarn", 5e4, factor=4.0, original_max_position_embeddings=64)
    theirs = config.to_transformers().to_dict()
    source = json.loads((folder / "config.json").read_text())
    decisive = [name for name in source if name in theirs and name not in BOOKKEEPING]
    assert len(decisive) > 20
    assert {name: theirs[name] for name in decisive} == {name: source[name] for name in decisive}
