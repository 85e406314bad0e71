"""A dense Qwen2 graph for ONNX Runtime, written node by node: for runtime tests that need no exporter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qwenforge import names
from qwenforge.bundle import BundleWriter
from qwenforge.manifest import Geometry, Limits, Source
from support.bundle_builder import bundle_facts


class _Graph:
    """Collects nodes and initializers of one graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: list[str], outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        results = [f"{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, results, domain=domain, **attributes))
        return results

    def constant(self, value: NDArray[Any]) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name


def qwen2_graph(checkpoint: Path, *, positions: int = 256) -> onnx.ModelProto:
    """The graph of a dense fp32 Qwen2 checkpoint, with ``com.microsoft::GroupQueryAttention`` over in-place caches."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = model.config
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_size = config.hidden_size // heads
    frequencies = config.rope_parameters["rope_theta"] ** -(np.arange(0, head_size, 2) / head_size)
    angles = np.arange(positions)[:, None] * frequencies

    graph = _Graph()
    cos, sin = graph.constant(np.cos(angles).astype("f")), graph.constant(np.sin(angles).astype("f"))
    one = graph.constant(np.array(1, np.int64))

    def linear(x: str, *prefixes: str) -> str:
        weight = np.concatenate([state[f"{prefix}.weight"] for prefix in prefixes]).T
        y = graph.add("MatMul", [x, graph.constant(weight)])[0]
        if f"{prefixes[0]}.bias" in state:
            y = graph.add("Add", [y, graph.constant(np.concatenate([state[f"{p}.bias"] for p in prefixes]))])[0]
        return y

    def norm(x: str, name: str) -> str:
        return graph.add("RMSNormalization", [x, graph.constant(state[name])], epsilon=config.rms_norm_eps)[0]

    # seqlens_k[b] = cache_position[b] + S - 1 and total_sequence_length = max(cache_position) + S.
    length = graph.add("Gather", [graph.add("Shape", [names.INPUT_IDS])[0], one])[0]
    last = graph.add("Sub", [graph.add("Add", [names.CACHE_POSITION, length])[0], one])[0]
    seqlens = graph.add("Cast", [last], to=TensorProto.INT32)[0]
    total = graph.add("Add", [graph.add("ReduceMax", [names.CACHE_POSITION], keepdims=0)[0], length])[0]
    total = graph.add("Cast", [total], to=TensorProto.INT32)[0]

    x = graph.add("Gather", [graph.constant(state["model.embed_tokens.weight"]), names.INPUT_IDS])[0]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        h = norm(x, f"{prefix}.input_layernorm.weight")
        q, k, v = (linear(h, f"{prefix}.self_attn.{kind}_proj") for kind in "qkv")
        past = [names.past_key(layer), names.past_value(layer)]
        outputs = [f"attention_{layer}", names.present_key(layer), names.present_value(layer)]
        graph.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [q, k, v, *past, seqlens, total, cos, sin, names.POSITION_IDS],
                outputs,
                domain="com.microsoft",
                num_heads=heads,
                kv_num_heads=kv_heads,
                do_rotary=1,
                rotary_interleaved=0,
            )
        )
        x = graph.add("Add", [x, linear(outputs[0], f"{prefix}.self_attn.o_proj")])[0]
        h = norm(x, f"{prefix}.post_attention_layernorm.weight")
        gate, up = graph.add(
            "Split", [linear(h, f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")], 2, axis=-1, num_outputs=2
        )
        h = graph.add("Mul", [graph.add("Swish", [gate])[0], up])[0]
        x = graph.add("Add", [x, linear(h, f"{prefix}.mlp.down_proj")])[0]
    x = norm(x, "model.norm.weight")
    index = graph.add("Unsqueeze", [names.LOGITS_INDEX, graph.constant(np.array([2], np.int64))])[0]
    x = graph.add("GatherND", [x, index], batch_dims=1)[0]
    graph.nodes.append(helper.make_node("MatMul", [x, graph.constant(state["lm_head.weight"].T)], [names.LOGITS]))

    tokens = [names.BATCH, names.SEQUENCE]
    cache = [names.BATCH, kv_heads, names.CAPACITY, head_size]
    inputs = [
        (names.INPUT_IDS, TensorProto.INT64, tokens),
        (names.POSITION_IDS, TensorProto.INT64, tokens),
        (names.CACHE_POSITION, TensorProto.INT64, [names.BATCH]),
        (names.LOGITS_INDEX, TensorProto.INT64, [names.BATCH, names.LOGITS_COUNT]),
    ]
    outputs_ = [(names.LOGITS, TensorProto.FLOAT, [names.BATCH, names.LOGITS_COUNT, config.vocab_size])]
    for layer in range(config.num_hidden_layers):
        inputs += [(name(layer), TensorProto.FLOAT, cache) for name in (names.past_key, names.past_value)]
        outputs_ += [(name(layer), TensorProto.FLOAT, cache) for name in (names.present_key, names.present_value)]
    proto = helper.make_graph(
        graph.nodes,
        "qwen2",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs_],
        graph.initializers,
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=11)


def write_qwen2_bundle(checkpoint: Path, out: Path, *, max_length: int = 256, **changes: Any) -> Path:
    """A runnable ``ort-cpu`` bundle of a dense checkpoint made by ``support.checkpoints``; returns ``out``."""
    model = qwen2_graph(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    facts = {
        "source": Source(path_name="tiny", model_type="qwen2", config={}, fingerprint="ab" * 32, dtype="float32"),
        "limits": Limits(max_length=max_length),
        "eos_token_ids": [config["eos_token_id"]],
        "model": Geometry(
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=config["hidden_size"] // config["num_attention_heads"],
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
        ),
    }
    with BundleWriter(out) as writer:
        (writer.directory / "model.onnx").write_bytes(model.SerializeToString())
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (checkpoint / name).exists():
                writer.add_text(name, (checkpoint / name).read_text(encoding="utf-8"))
        return writer.commit(bundle_facts(**(facts | changes)))
