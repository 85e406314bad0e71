"""Experts as calibration sees them: which tokens each is given, and what its channels carry.

The meaning is that of ``qwenforge::MixtureOfExperts``: softmax over all experts, the top k of them, SwiGLU with gate
rows before up rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.calibration.activations import Activation
from qwenforge.calibration.matrices import read_matrix
from qwenforge.exporter import weights
from qwenforge.graph_passes.infra import int_attribute
from qwenforge.graph_passes.quantize.sites import ExpertSite

Array = npt.NDArray[Any]

_CHUNK_TOKENS = 2048


class Experts:
    """The experts of a layer with the tokens they are given.

    Args:
        site: the call in the graph.
        tokens: the experts' input x; None without data, when no expert is given anything.
        router_logits: [T, E].

    Attributes:
        count, channels, width: E, C and I.
        tokens: as given.
    """

    def __init__(self, site: ExpertSite, tokens: Activation | None, router_logits: Activation | None) -> None:
        self.tokens = tokens
        self._name = site.name
        self._stacks = [_constant(site.node, index) for index in (2, 3)]
        self.count, rows, self.channels = weights.dims(self._stacks[0])
        self.width = rows // 2
        top_k = int_attribute(site.node, "top_k", 1)
        chosen = _chosen(router_logits.all(), top_k) if router_logits is not None else np.zeros((0, top_k), np.int64)
        self._given = [np.flatnonzero((chosen == expert).any(1)) for expert in range(self.count)]

    def given(self, expert: int) -> Array:
        """The numbers of the tokens that ``expert`` is given, ascending."""
        return self._given[expert]

    @property
    def tokens_by_expert(self) -> tuple[int, ...]:
        """How many tokens each expert is given."""
        return tuple(len(tokens) for tokens in self._given)

    def gate_up(self, expert: int) -> Array:
        """[2I, C] float32."""
        return expert_matrix(self._stacks[0], expert, self._name)

    def down(self, expert: int) -> Array:
        """[C, I] float32."""
        return expert_matrix(self._stacks[1], expert, self._name)

    def inputs(self, numbers: Array) -> Array:
        """[N, C]: tokens of those numbers."""
        assert self.tokens is not None
        return self.tokens.gather(numbers)

    def chunks(self, expert: int, numbers: Array) -> Iterator[tuple[Array, Array]]:
        """Tokens [n, C] of those numbers, and what ``expert``'s down projection is given for them, [n, I]."""
        gate_up = self.gate_up(expert)
        for start in range(0, len(numbers), _CHUNK_TOKENS):
            inputs = self.inputs(numbers[start : start + _CHUNK_TOKENS])
            yield inputs, hidden(inputs, gate_up)


def expert_matrix(stack: ir.TensorProtocol, expert: int, site: str) -> Array:
    """One expert's matrix of a stack [E, N, K], as [N, K] float32; no other expert's is read.

    Raises:
        UserError: it holds NaN or infinity.
    """
    _, rows, columns = weights.dims(stack)
    one = weights.reshape(weights.slice_(stack, 0, expert, expert + 1), (rows, columns))
    return read_matrix(one, f"expert {expert} of {site}")


def hidden(inputs: Array, gate_up: Array) -> Array:
    """[T, I]: swish(gate) * up of inputs [T, C]."""
    gate, up = np.split(inputs @ gate_up.T, 2, axis=1)
    with np.errstate(over="ignore"):  # exp(-gate) of a very negative gate: its swish is 0
        activated = gate / (1 + np.exp(-gate))
    product: Array = activated * up
    return product


def _chosen(logits: Array, top_k: int) -> Array:
    """[T, k]: the experts of the largest logits; of equals the first, as TopK has it."""
    order: Array = np.argsort(-logits, axis=1, kind="stable")
    return order[:, :top_k]


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    if value is None or value.const_value is None:
        raise ValueError(f"{node.name} computes its weights")
    return value.const_value
