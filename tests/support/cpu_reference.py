"""Products by quantized matrices in float64, and how far kernels that round activations to int8 may be from them.

A kernel rounds an activation to the nearest of its group's 255 numbers. Which one that is, is certain unless the
activation lies half way between two, so almost every answer is known up to fp32's rounding: an :class:`Approximate`
carries what the uncertain ones may cost beside the value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from support.tolerances import FLOAT32_EXACT

Array = npt.NDArray[Any]

_EDGE = 1e-4
"""Of a step: 127 times the relative error of a quotient or of SiLU in fp32, some times over."""


@dataclass(frozen=True)
class Approximate:
    """``value`` float64 of any shape, and by how much another answer may differ from it."""

    value: Array
    slack: Array

    @classmethod
    def exactly(cls, value: Array) -> Approximate:
        value = np.asarray(value, np.float64)
        return cls(value, np.zeros_like(value))

    def __getitem__(self, index: Any) -> Approximate:
        return Approximate(self.value[index], self.slack[index])

    def check(self, found: Array) -> None:
        """Fail where ``found`` differs by more; NaN and infinity are nowhere allowed."""
        assert found.shape == self.value.shape, (found.shape, self.value.shape)
        excess = np.abs(found - self.value) - self.slack
        worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        assert excess[worst] <= 0, (
            f"at {tuple(map(int, worst))}: {found[worst]}, not {self.value[worst]} +- {self.slack[worst]:.3g}; "
            f"{np.count_nonzero(~(excess <= 0))} of {excess.size} differ"
        )


@dataclass(frozen=True)
class Stored:
    """A matrix [N, K] as MatMulNBits stores it.

    ``codes`` [N, groups * group] uint8, padded behind K; ``scales`` float32 and ``zero_points`` uint8 or None
    [N, groups].
    """

    codes: Array
    scales: Array
    zero_points: Array | None
    columns: int
    depth: int
    bits: int
    group: int

    @classmethod
    def random(
        cls,
        columns: int,
        depth: int,
        bits: int = 4,
        group: int = 32,
        *,
        zero_points: bool = False,
        half_scales: bool = True,
        seed: int = 0,
    ) -> Stored:
        """Codes of every size, behind K too, which nobody may count; scales about one to ``middle * sqrt(K)``."""
        rng = np.random.default_rng([seed, columns, depth, bits, group])
        groups = -(-depth // group)
        typical = 2.0 / (2**bits * np.sqrt(depth))
        scales = (
            typical
            * rng.uniform(0.5, 1.5, (columns, groups))
            * rng.choice([1.0, -1.0], (columns, groups), p=[0.9, 0.1])
        )
        kept = np.float16(scales).astype(np.float32) if half_scales else scales.astype(np.float32)
        return cls(
            rng.integers(0, 2**bits, (columns, groups * group), np.uint8),
            kept,
            rng.integers(0, 2**bits, (columns, groups), np.uint8) if zero_points else None,
            columns,
            depth,
            bits,
            group,
        )

    @property
    def groups(self) -> int:
        return int(self.scales.shape[1])

    @property
    def dequantized(self) -> Array:
        """float64 [N, K]."""
        middle = np.full_like(self.scales, 2 ** (self.bits - 1)) if self.zero_points is None else self.zero_points
        codes = self.codes.reshape(self.columns, self.groups, self.group).astype(np.float64)
        weights = (codes - middle[:, :, None]) * self.scales[:, :, None].astype(np.float64)
        return np.asarray(weights.reshape(self.columns, -1)[:, : self.depth])

    @property
    def tensors(self) -> list[Array | None]:
        """What a node takes: codes, scales and zero points, packed."""
        packed = _packed(self.codes.reshape(self.columns, self.groups, self.group), self.bits)
        points = None if self.zero_points is None else _packed(self.zero_points, self.bits)
        return [packed, self.scales, points]


def _packed(codes: Array, bits: int) -> Array:
    """Along the last axis; of two 4-bit codes in a byte the first has the lower half."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return np.asarray(codes[..., 0::2] | codes[..., 1::2] << 4, np.uint8)


@dataclass
class Rounded:
    """Rows [.., K] rounded to int8 by groups."""

    value: Array
    slack: Array
    step: Array = field(repr=False)


def rounded(rows: Approximate, group: int) -> Rounded:
    """``code * step``, the step a 127th of the group's largest; ``step`` is [.., K] too."""
    depth = rows.value.shape[-1]
    padding = [(0, 0)] * (rows.value.ndim - 1) + [(0, -depth % group)]
    value, slack = (np.pad(each, padding) for each in (rows.value, rows.slack))
    shape = (*value.shape[:-1], -1, group)
    value, slack = value.reshape(shape), slack.reshape(shape)
    step = np.abs(value).max(-1, keepdims=True) / 127
    of_largest = slack.max(-1, keepdims=True)
    position = np.divide(value, step, out=np.zeros_like(value), where=step > 0)
    uncertain = _EDGE + np.divide(slack + of_largest, step, out=np.zeros_like(value), where=step > 0)
    code = np.rint(position)
    to_edge = np.abs(np.abs(position - code) - 0.5)
    cost = step * np.where(to_edge < uncertain, 1 + np.floor(uncertain), 0) + of_largest
    # A group's largest is 127 whatever its size.
    back = (*value.shape[:-2], -1)
    value, cost, step = ((each + np.zeros_like(value)).reshape(back)[..., :depth] for each in (code * step, cost, step))
    return Rounded(value, cost, step)


def product(rows: Approximate, matrix: Stored) -> Approximate:
    """[.., N]: ``rows``, rounded to int8 by the matrix's groups, by the dequantized matrix."""
    weights, codes = matrix.dequantized, rounded(rows, matrix.group)
    slack = codes.slack @ np.abs(weights).T + FLOAT32_EXACT * _group_sums(codes.value, matrix)
    return Approximate(codes.value @ weights.T, slack)


def _group_sums(rows: Array, matrix: Stored) -> Array:
    """[.., N]: the magnitudes of what kernels add in fp32, which are a group's products and its zero point's part."""
    padding = (0, matrix.groups * matrix.group - matrix.depth)
    rows = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [padding]).reshape(*rows.shape[:-1], matrix.groups, matrix.group)
    middle = 2.0 ** (matrix.bits - 1)
    codes = matrix.codes.reshape(matrix.columns, matrix.groups, matrix.group) - middle
    found = np.zeros((*rows.shape[:-2], matrix.columns))
    for group in range(matrix.groups):
        sums = np.abs(rows[..., group, :] @ codes[:, group].T)
        if matrix.zero_points is not None:
            sums += np.abs(rows[..., group, :].sum(-1)[..., None] * (matrix.zero_points[:, group] - middle))
        found += sums * np.abs(matrix.scales[:, group])
    return found


def half_step(rows: Array, matrix: Stored) -> Approximate:
    """The product of ``rows`` themselves, and what half a step of each may cost."""
    weights, codes = matrix.dequantized, rounded(Approximate.exactly(rows), matrix.group)
    slack = (codes.step * (0.5 + _EDGE)) @ np.abs(weights).T
    return Approximate(
        np.asarray(rows, np.float64) @ weights.T, slack + FLOAT32_EXACT * np.abs(rows) @ np.abs(weights).T
    )


def normalized(rows: Array, weight: Array | None, epsilon: float) -> Approximate:
    """RMS norm of fp32 ``rows`` [.., K]; they themselves where there is no ``weight``."""
    value = np.asarray(rows, np.float64)
    if weight is None:
        return Approximate.exactly(value)
    value = value / np.sqrt((value**2).mean(-1, keepdims=True) + epsilon) * weight
    return Approximate(value, FLOAT32_EXACT * np.abs(value))


def gated(gate: Approximate, up: Approximate) -> Approximate:
    """silu(gate) * up; the derivative of SiLU is below 1.1."""
    silu = gate.value / (1 + np.exp(-gate.value))
    slack = 1.1 * gate.slack * (np.abs(up.value) + up.slack) + np.abs(silu) * up.slack
    return Approximate(silu * up.value, slack + FLOAT32_EXACT * np.abs(silu * up.value))


def mlp(rows: Approximate, gate: Stored, up: Stored, down: Stored) -> Approximate:
    """A gated MLP as QuantizedGatedMlp and each expert compute it."""
    return product(gated(product(rows, gate), product(rows, up)), down)


def exact_mlp(rows: Approximate, gate: Stored, up: Stored, down: Stored) -> Approximate:
    """The same without rounding activations."""
    inner = gated(*(Approximate.exactly(rows.value @ matrix.dequantized.T) for matrix in (gate, up)))
    return Approximate.exactly(inner.value @ down.dequantized.T)


def on_grid(rng: np.random.Generator, rows: int, depth: int, group: int) -> Array:
    """float32 [rows, depth] that int8 has exactly: integers up to 127, one of them +-127, times a power of two."""
    padded = -(-depth // group) * group
    values = rng.integers(-127, 128, (rows, padded // group, group)).astype(np.float32)
    # In the part of the last group that is there.
    reach = np.minimum(group, depth - group * np.arange(padded // group))
    places = rng.integers(0, reach, (rows, padded // group))
    np.put_along_axis(values, places[:, :, None], rng.choice([-127.0, 127.0], (*places.shape, 1)), -1)
    values *= 2.0 ** rng.integers(-9, -3, (rows, padded // group, 1))
    return np.ascontiguousarray(values.reshape(rows, padded)[:, :depth], np.float32)
