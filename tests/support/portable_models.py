"""The portable form written node by node from a transformers model: a second producer, sharing no code with the passes.

Weights are lazy plans over the checkpoint's [out, in] matrices, as the exporter makes them, so that lowerings can be
judged by what they do to the plans. Rotary tables come from transformers' own module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from qwenforge import names
from qwenforge.exporter import weights
from qwenforge.graph_passes.functions import GROUPED_QUERY_ATTENTION, MIXTURE_OF_EXPERTS, register_function
from support.checkpoints import Kind, make_checkpoint

Dims = Sequence[int | str]


def random_model(kind: Kind, *, rounded_to: str = "float32", **config: Any) -> Any:
    """A random transformers model in fp32 whose weights are exactly representable in ``rounded_to``.

    ``config`` goes to :func:`support.checkpoints.make_checkpoint`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder), kind, dtype=rounded_to, tokenizer=False, **config)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def portable_model(model: Any, *, dtype: ir.DataType = ir.DataType.FLOAT, positions: int = 256) -> ir.Model:
    """The portable form of a transformers Qwen2, Qwen2-MoE, Qwen3 or Qwen3-MoE model.

    Args:
        model: the model, in fp32.
        dtype: of weights, caches and activations; logits are fp32 always.
        positions: rows of the rotary tables.
    """
    return _PortableModel(model, dtype, positions).build()


class _PortableModel:
    def __init__(self, model: Any, dtype: ir.DataType, positions: int) -> None:
        self._config = model.config
        self._dtype = dtype
        self._state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
        self._initializers: dict[str, ir.Value] = {}
        self._leaves: dict[str, ir.TensorProtocol] = {}
        self._nodes: list[ir.Node] = []
        self._outputs: list[ir.Value] = []
        self._head_size = getattr(self._config, "head_dim", None) or (
            self._config.hidden_size // self._config.num_attention_heads
        )
        integer = ir.DataType.INT64
        self._inputs = [
            _value(names.INPUT_IDS, integer, (names.BATCH, names.SEQUENCE)),
            _value(names.POSITION_IDS, integer, (names.BATCH, names.SEQUENCE)),
            _value(names.CACHE_POSITION, integer, (names.BATCH,)),
            _value(names.LOGITS_INDEX, integer, (names.BATCH, names.LOGITS_COUNT)),
        ]
        self._cos, self._sin = self._rotary_tables(model, positions)

    def build(self) -> ir.Model:
        config, hidden = self._config, (names.BATCH, names.SEQUENCE, self._config.hidden_size)
        tokens, _, _, index = self._inputs
        table = self._initializer("model.embed_tokens.weight", self._leaf("model.embed_tokens.weight"))
        x = self._add("model.embed_tokens", "Gather", [table, tokens], hidden)
        for layer in range(config.num_hidden_layers):
            x = self._layer(layer, x)
        x = self._norm("model.norm", x, hidden)
        axis = self._array("logits_index.axis", np.array([-1]))
        where = self._add("logits_index.unsqueeze", "Unsqueeze", [index, axis], (names.BATCH, names.LOGITS_COUNT, 1))
        where.type = ir.TensorType(ir.DataType.INT64)
        count = (names.BATCH, names.LOGITS_COUNT)
        x = self._add("logits_index.gather", "GatherND", [x, where], (*count, config.hidden_size), batch_dims=1)
        logits = self._linear("lm_head", x, (*count, config.vocab_size))
        if self._dtype != ir.DataType.FLOAT:
            logits = self._add("logits", "Cast", [logits], logits.shape, to=ir.DataType.FLOAT.value)
            logits.type = ir.TensorType(ir.DataType.FLOAT)
        logits.name = names.LOGITS
        graph = ir.Graph(
            self._inputs,
            [logits, *self._outputs],
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": 24},
            name="decoder",
        )
        model = ir.Model(graph, ir_version=11, producer_name="tests")
        for op_type in {node.op_type for node in self._nodes if node.domain == names.DOMAIN}:
            register_function(model, op_type)
        return model

    def _layer(self, layer: int, x: ir.Value) -> ir.Value:
        scope = f"model.layers.{layer}"
        hidden = (names.BATCH, names.SEQUENCE, self._config.hidden_size)
        h = self._norm(f"{scope}.input_layernorm", x, hidden)
        attended = self._attention(layer, h)
        x = self._add(f"{scope}.attention_residual", "Add", [x, attended], hidden)
        h = self._norm(f"{scope}.post_attention_layernorm", x, hidden)
        sparse = f"{scope}.mlp.gate.weight" in self._state
        fed = self._experts(f"{scope}.mlp", h) if sparse else self._dense(f"{scope}.mlp", h)
        return self._add(f"{scope}.mlp_residual", "Add", [x, fed], hidden)

    def _attention(self, layer: int, h: ir.Value) -> ir.Value:
        config, scope = self._config, f"model.layers.{layer}.self_attn"
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, self._head_size
        parts = []
        for kind, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            part = self._linear(f"{scope}.{kind}_proj", h, (names.BATCH, names.SEQUENCE, count * size))
            parts.append(self._head_norm(f"{scope}.{kind}_norm", part, count))
        cache = (names.BATCH, kv_heads, names.CAPACITY, size)
        past = [_value(name(layer), self._dtype, cache) for name in (names.past_key, names.past_value)]
        self._inputs += past
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        window = config.sliding_window if kinds[layer] == "sliding_attention" else 0
        node = ir.node(
            GROUPED_QUERY_ATTENTION,
            [*parts, *past, self._cos, self._sin, self._inputs[1], self._inputs[2]],
            {
                "num_heads": heads,
                "num_key_value_heads": kv_heads,
                "scale": float(size**-0.5),
                "sliding_window": window,
            },
            domain=names.DOMAIN,
            num_outputs=3,
            name=f"{scope}.attention",
        )
        y, *present = node.outputs
        _describe(y, f"{scope}.attention.output", self._dtype, (names.BATCH, names.SEQUENCE, heads * size))
        for value, name in zip(present, (names.present_key, names.present_value), strict=True):
            _describe(value, name(layer), self._dtype, cache)
        self._nodes.append(node)
        self._outputs += present
        return self._linear(f"{scope}.o_proj", y, (names.BATCH, names.SEQUENCE, config.hidden_size))

    def _head_norm(self, name: str, x: ir.Value, count: int) -> ir.Value:
        """Qwen3's norm of each head of q and k; other values pass."""
        if f"{name}.weight" not in self._state:
            return x
        split = self._array(f"{name}.heads", np.array([0, 0, count, self._head_size]))
        joined = self._array("attention.joined", np.array([0, 0, -1]))
        shape = (names.BATCH, names.SEQUENCE, count, self._head_size)
        y = self._add(f"{name}.split", "Reshape", [x, split], shape)
        return self._add(f"{name}.join", "Reshape", [self._norm(name, y, shape), joined], x.shape)

    def _dense(self, scope: str, x: ir.Value) -> ir.Value:
        """SwiGLU with gate and up merged in one product."""
        assert x.shape is not None
        lead = tuple(x.shape)[:-1]
        size = self._state[f"{scope}.gate_proj.weight"].shape[0]
        merged = weights.concat([self._transposed(f"{scope}.{kind}_proj.weight") for kind in ("gate", "up")], 1)
        weight = self._initializer(f"{scope}.gate_up_proj.weight", merged)
        both = self._add(f"{scope}.gate_up_proj", "MatMul", [x, weight], (*lead, 2 * size))
        split = ir.node("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{scope}.split")
        self._nodes.append(split)
        for index, value in enumerate(split.outputs):
            _describe(value, f"{scope}.split.{index}", self._dtype, (*lead, size))
        active = self._add(f"{scope}.act_fn", "Swish", [split.outputs[0]], (*lead, size))
        product = self._add(f"{scope}.gated", "Mul", [active, split.outputs[1]], (*lead, size))
        return self._linear(f"{scope}.down_proj", product, (*lead, self._config.hidden_size))

    def _experts(self, scope: str, h: ir.Value) -> ir.Value:
        config = self._config
        rows, width = "tokens", config.hidden_size
        flat = self._array("tokens.flat", np.array([-1, width]))
        x = self._add(f"{scope}.flatten", "Reshape", [h, flat], (rows, width))
        router = self._linear(f"{scope}.gate", x, (rows, config.num_experts))
        stacks = [f"{scope}.experts.{kind}_proj" for kind in ("gate_up", "down")]
        y = self._add(
            f"{scope}.experts",
            MIXTURE_OF_EXPERTS,
            [x, router, *(self._initializer(name, self._leaf(name)) for name in stacks)],
            (rows, width),
            domain=names.DOMAIN,
            top_k=config.num_experts_per_tok,
            normalize_topk=int(config.norm_topk_prob),
        )
        if f"{scope}.shared_expert.down_proj.weight" in self._state:
            shared = self._dense(f"{scope}.shared_expert", x)
            gate = self._linear(f"{scope}.shared_expert_gate", x, (rows, 1))
            opened = self._add(f"{scope}.shared_expert_sigmoid", "Sigmoid", [gate], (rows, 1))
            weighted = self._add(f"{scope}.shared_expert_weighted", "Mul", [opened, shared], (rows, width))
            y = self._add(f"{scope}.sum", "Add", [y, weighted], (rows, width))
        # The input's shape is the output's: no arithmetic on batch and sequence.
        shape = next((n.outputs[0] for n in self._nodes if n.name == "tokens.shape"), None)
        if shape is None:
            shape = self._add("tokens.shape", "Shape", [h], (3,))
            shape.type = ir.TensorType(ir.DataType.INT64)
        return self._add(f"{scope}.unflatten", "Reshape", [y, shape], h.shape)

    def _linear(self, name: str, x: ir.Value, shape: Dims) -> ir.Value:
        product = [x, self._initializer(f"{name}.weight.transposed", self._transposed(f"{name}.weight"))]
        bias = f"{name}.bias"
        if bias not in self._state:
            return self._add(name, "MatMul", product, shape)
        y = self._add(f"{name}.product", "MatMul", product, shape)
        return self._add(name, "Add", [y, self._initializer(bias, self._leaf(bias))], shape)

    def _norm(self, name: str, x: ir.Value, shape: Dims) -> ir.Value:
        weight = self._initializer(f"{name}.weight", self._leaf(f"{name}.weight"))
        return self._add(name, "RMSNormalization", [x, weight], shape, axis=-1, epsilon=self._config.rms_norm_eps)

    def _rotary_tables(self, model: Any, positions: int) -> tuple[ir.Value, ir.Value]:
        import torch

        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(positions)[None])
        half = self._head_size // 2
        dtype = self._dtype.numpy()
        cos_table = self._array("rotary.cos", cos[0, :, :half].numpy().astype(dtype))
        return cos_table, self._array("rotary.sin", sin[0, :, :half].numpy().astype(dtype))

    def _leaf(self, name: str) -> ir.TensorProtocol:
        source = name
        if name == "lm_head.weight" and self._config.tie_word_embeddings:
            source = "model.embed_tokens.weight"
        if source not in self._leaves:
            self._leaves[source] = ir.tensor(self._state[source].astype(self._dtype.numpy()), name=source)
        return self._leaves[source]

    def _transposed(self, name: str) -> ir.TensorProtocol:
        return weights.transpose(self._leaf(name), [1, 0])

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._initializers:
            value = _value(name, tensor.dtype, tuple(tensor.shape.numpy()))
            value.const_value = tensor
            self._initializers[name] = value
        return self._initializers[name]

    def _array(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        return self._initializer(name, ir.tensor(array, name=name))

    def _add(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Dims | ir.Shape | None,
        *,
        domain: str = "",
        **attributes: int | float,
    ) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=name)
        self._nodes.append(node)
        return _describe(node.outputs[0], f"{name}.output", self._dtype, shape)


def _value(name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _describe(value: ir.Value, name: str, dtype: ir.DataType, shape: Dims | ir.Shape | None) -> ir.Value:
    value.name, value.type = name, ir.TensorType(dtype)
    value.shape = ir.Shape(shape) if shape is not None else None
    return value
