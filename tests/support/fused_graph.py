"""A graph as the ort-cpu lowering names and shapes it, without weights worth reading: for tests that only look."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qwenforge import names

C, D, HEADS, KV_HEADS, INTERMEDIATE, EXPERTS, VOCAB, POSITIONS = 16, 4, 4, 2, 24, 6, 40, 32


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def weight(self, name: str, *shape: int) -> ir.Value:
        tensor = ir.tensor(np.zeros(shape, np.float32), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
        self.initializers.append(value)
        return value

    def add(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        outputs: Sequence[ir.Value] = (),
        count: int = 1,
    ) -> list[ir.Value]:
        made = list(outputs) or [ir.Value(name=f"{name}.out{index}") for index in range(count)]
        self.nodes.append(ir.Node(domain, op_type, list(inputs), outputs=made, name=name))
        return made


def fused_graph(kinds: Sequence[str]) -> ir.Model:
    """A decoder whose layers are ``dense`` or ``moe``, fused, in the names of our exporter; never to be run."""
    build = _Builder()
    integer, real = ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.FLOAT)

    def tensor(name: str, kind: ir.TensorType, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=kind, shape=ir.Shape(shape))

    tokens = tensor(names.INPUT_IDS, integer, names.BATCH, names.SEQUENCE)
    lengths = tensor(names.CACHE_POSITION, integer, names.BATCH)
    inputs, outputs = [tokens, lengths], [tensor(names.LOGITS, real, names.BATCH, names.LOGITS_COUNT, VOCAB)]
    cos, sin = build.weight("cos_cache", POSITIONS, D // 2), build.weight("sin_cache", POSITIONS, D // 2)
    x = build.add("model.embed_tokens", "Gather", [build.weight("model.embed_tokens.weight", VOCAB, C), tokens])[0]
    for layer, kind in enumerate(kinds):
        at = f"model.layers.{layer}."
        shape = (names.BATCH, KV_HEADS, names.CAPACITY, D)
        past = [tensor(name(layer), real, *shape) for name in (names.past_key, names.past_value)]
        present = [tensor(name(layer), real, *shape) for name in (names.present_key, names.present_value)]
        inputs += past
        outputs += present
        norm = build.weight(f"{at}input_layernorm.weight", C)
        h = build.add(f"{at}input_layernorm", "RMSNormalization", [x, norm])[0]
        packed = build.weight(f"{at}self_attn.qkv_proj.weight", C, (HEADS + 2 * KV_HEADS) * D)
        qkv = build.add(f"{at}self_attn.qkv_proj", "MatMul", [h, packed])[0]
        attention = [qkv, None, None, *past, lengths, None, cos, sin]
        y = ir.Value(name=f"{at}self_attn.y")
        build.add(f"{at}self_attn", "GroupQueryAttention", attention, domain="com.microsoft", outputs=[y, *present])
        o = build.add(
            f"{at}self_attn.o_proj", "MatMul", [y, build.weight(f"{at}self_attn.o_proj.weight", HEADS * D, C)]
        )[0]
        norm = build.weight(f"{at}post_attention_layernorm.weight", C)
        h, x = build.add(
            f"{at}post_attention_layernorm",
            "SkipSimplifiedLayerNormalization",
            [x, o, norm],
            domain="com.microsoft",
            count=2,
        )
        mlp = _experts(build, at, h) if kind == "moe" else _dense(build, f"{at}mlp", h)
        x = build.add(f"{at}residual", "Add", [x, mlp])[0]
    x = build.add("model.norm", "RMSNormalization", [x, build.weight("model.norm.weight", C)])[0]
    build.add("lm_head", "MatMul", [x, build.weight("lm_head.weight", C, VOCAB)], outputs=outputs[:1])
    opsets = {"": 24, "com.microsoft": 1}
    graph = ir.Graph(
        inputs, outputs, nodes=build.nodes, initializers=build.initializers, opset_imports=opsets, name="decoder"
    )
    return ir.Model(graph, ir_version=11, producer_name="qwenforge")


def _dense(build: _Builder, at: str, x: ir.Value) -> ir.Value:
    merged = build.add(
        f"{at}.gate_up_proj", "MatMul", [x, build.weight(f"{at}.gate_up_proj.weight", C, 2 * INTERMEDIATE)]
    )
    gate, up = build.add(f"{at}.split", "Split", merged, count=2)
    active = build.add(f"{at}.act", "QuickGelu", [gate], domain="com.microsoft")
    product = build.add(f"{at}.mul", "Mul", [*active, up])
    return build.add(f"{at}.down_proj", "MatMul", [*product, build.weight(f"{at}.down_proj.weight", INTERMEDIATE, C)])[
        0
    ]


def _experts(build: _Builder, at: str, x: ir.Value) -> ir.Value:
    router = build.add(f"{at}mlp.gate", "MatMul", [x, build.weight(f"{at}mlp.gate.weight", C, EXPERTS)])
    gate_up = build.weight(f"{at}mlp.experts.gate_up_proj", EXPERTS, 2 * INTERMEDIATE, C)
    down = build.weight(f"{at}mlp.experts.down_proj", EXPERTS, C, INTERMEDIATE)
    routed = build.add(f"{at}mlp.experts", "MoE", [x, *router, gate_up, None, down], domain="com.microsoft")
    shared = _dense(build, f"{at}mlp.shared_expert", x)
    gate = build.add(
        f"{at}mlp.shared_expert_gate", "MatMul", [x, build.weight(f"{at}mlp.shared_expert_gate.weight", C, 1)]
    )
    weighted = build.add(f"{at}mlp.shared_mul", "Mul", [shared, *build.add(f"{at}mlp.sigmoid", "Sigmoid", gate)])
    return build.add(f"{at}mlp.sum", "Add", [*routed, *weighted])[0]
