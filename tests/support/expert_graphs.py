"""One ``qwenforge::MixtureOfExperts`` call as a graph, and its meaning in numpy with fp64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.functions import MIXTURE_OF_EXPERTS, register_function
from support.small_graphs import Array


@dataclass(frozen=True)
class ExpertCase:
    """Inputs of one call: x [T, C], router_logits [T, E], gate_up [E, 2I, C], down [E, C, I]."""

    x: Array
    router_logits: Array
    gate_up: Array
    down: Array
    top_k: int
    normalize: bool

    def graph(self) -> ir.Model:
        """The call with weights as initializers."""
        dtype = ir.DataType.from_numpy(self.x.dtype)
        x = _value("x", dtype, ("tokens", self.x.shape[1]))
        logits = _value("router_logits", ir.DataType.from_numpy(self.router_logits.dtype), ("tokens", len(self.down)))
        gate_up, down = (_value(name, dtype, array.shape) for name, array in self._weights())
        for value, (name, array) in zip((gate_up, down), self._weights(), strict=True):
            value.const_value = ir.tensor(array, name=name)
        node = ir.node(
            MIXTURE_OF_EXPERTS,
            [x, logits, gate_up, down],
            {"top_k": self.top_k, "normalize_topk": int(self.normalize)},
            domain=names.DOMAIN,
            name="model.layers.0.mlp.experts",
        )
        y = node.outputs[0]
        y.name, y.type, y.shape = "y", ir.TensorType(dtype), ir.Shape(("tokens", self.x.shape[1]))
        graph = ir.Graph(
            [x, logits], [y], nodes=[node], initializers=[gate_up, down], opset_imports={"": 24}, name="experts"
        )
        model = ir.Model(graph, ir_version=11)
        register_function(model, MIXTURE_OF_EXPERTS)
        return model

    def _weights(self) -> list[tuple[str, Array]]:
        return [("experts.gate_up", self.gate_up), ("experts.down", self.down)]

    def feeds(self) -> dict[str, Array]:
        """The graph's inputs."""
        return {"x": self.x, "router_logits": self.router_logits}

    def expected(self) -> Array:
        """The answer in fp64; of equal logits the first experts win, as with ``TopK``."""
        x, logits = self.x.astype(np.float64), self.router_logits.astype(np.float64)
        gate_up, down = self.gate_up.astype(np.float64), self.down.astype(np.float64)
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        y = np.zeros_like(x)
        for token, row in enumerate(probabilities):
            chosen = np.argsort(-row, kind="stable")[: self.top_k]
            weights = row[chosen] / (row[chosen].sum() if self.normalize else 1)
            for expert, weight in zip(chosen, weights, strict=True):
                gate, up = np.split(gate_up[expert] @ x[token], 2)
                y[token] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
        return y


def expert_case(
    experts: int,
    top_k: int,
    *,
    normalize: bool = False,
    tokens: int = 5,
    hidden: int = 32,
    intermediate: int = 24,
    dtype: type[np.floating] = np.float32,
    router_scale: float = 1.0,
    weight_scale: float = 1.0,
) -> ExpertCase:
    """A seeded case. No two logits of a token are within 1/128 of each other, so that every kernel selects alike."""
    random = np.random.default_rng([experts, top_k, tokens, hidden, intermediate])
    ranks = random.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
    logits = router_scale * ((ranks - experts / 2) / 32 + random.uniform(0, 1 / 128, (tokens, experts)))
    return ExpertCase(
        x=random.normal(size=(tokens, hidden)).astype(dtype),
        router_logits=logits.astype(dtype),
        gate_up=random.normal(0, weight_scale / hidden**0.5, (experts, 2 * intermediate, hidden)).astype(dtype),
        down=random.normal(0, 1 / intermediate**0.5, (experts, hidden, intermediate)).astype(dtype),
        top_k=top_k,
        normalize=normalize,
    )


def _value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
