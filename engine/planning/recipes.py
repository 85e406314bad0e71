"""Weight formats that a plan compares: what a matrix costs in each, and at which rate it is multiplied."""

from __future__ import annotations

from dataclasses import dataclass

from qwenforge.engine.planning.model_size import Parameters
from qwenforge.exporter.prequantized.format import Format

_SIXTEEN_BITS = 2.0


@dataclass(frozen=True)
class Recipe:
    """One way to store and multiply weights.

    Attributes:
        name: of the recipe.
        summary: what it does, in a few words.
        weight: the precision of the matrices, one of ``qwenforge.devices.PRECISIONS``.
        arithmetic: the precision they are multiplied in.
        bits: of a stored matrix element, scales included.
    """

    name: str
    summary: str
    weight: str
    arithmetic: str
    bits: float

    def weight_bytes(self, parameters: Parameters) -> float:
        """Bytes of all weights: matrices in this format; embedding, head, norms and routers in 16 bits."""
        matrices = (parameters.dense + parameters.experts) * self.bits / 8
        vocabulary = parameters.embedding + (0 if parameters.tied else parameters.head)
        return matrices + (vocabulary + parameters.other) * _SIXTEEN_BITS

    def bytes_read(self, parameters: Parameters, expert_share: float, looked_up: int) -> float:
        """Bytes of weights that a step reads: ``expert_share`` of the experts, ``looked_up`` embedding elements."""
        matrices = (parameters.dense + parameters.experts * expert_share) * self.bits / 8
        table = min(looked_up, parameters.embedding)
        return matrices + (parameters.head + parameters.other + table) * _SIXTEEN_BITS


RECIPES = (
    Recipe("bf16", "16-bit weights and activations", "bf16", "bf16", 16.0),
    Recipe("fp8", "8-bit floating-point weights and activations, static scales", "fp8", "fp8", 8.0),
    Recipe("int8-w8a8", "8-bit integer weights and activations (SmoothQuant)", "int8", "int8", 8.0),
    Recipe("int8-weight-only", "8-bit weights, a scale a row, multiplied in 16 bits", "int8", "bf16", 8.0),
    Recipe("int4-weight-only", "4-bit weights, a scale for 128, multiplied in 16 bits", "int4", "bf16", 4.125),
)
"""From the most exact to the smallest; an 8-bit format's scale a row is less than 0.02 bits an element."""

STORED = "checkpoint"
"""The name of the recipe that keeps the codes of a checkpoint that is quantized already."""


def stored_recipe(stored: Format) -> Recipe:
    """What a quantized checkpoint costs as it is; its activations are 16-bit unless it has static scales for them."""
    weight = "int4" if stored.weight_format == "uint4" else stored.weight_format
    inputs = f", {stored.activation} activations" if stored.activation is not None else ", multiplied in 16 bits"
    return Recipe(
        STORED, f"the checkpoint's own {stored.summary} weights{inputs}", weight, _arithmetic(stored), stored.bits
    )


def _arithmetic(stored: Format) -> str:
    return stored.activation if stored.activation is not None else "bf16"
