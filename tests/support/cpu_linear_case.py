"""One QuantizedLinear: its model, its inputs and its answer in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from support.cpu_reference import Approximate, Array, Stored, normalized, on_grid, product
from support.cpu_runs import Job, node_model
from support.tolerances import FLOAT32_EXACT

EPSILON = 1e-5


@dataclass(frozen=True)
class LinearCase:
    """``columns`` and ``depth`` are N and K; ``grid``: the activations are numbers that int8 has."""

    bits: int = 4
    group: int = 32
    rows: int = 1
    columns: int = 100
    depth: int = 200
    leading: tuple[int, ...] = ()
    half_scales: bool = True
    zero_points: bool = False
    bias: bool = False
    residual: bool = False
    norm: bool = False
    wants_sum: bool = False
    grid: bool = True

    @property
    def matrix(self) -> Stored:
        return Stored.random(
            self.columns,
            self.depth,
            self.bits,
            self.group,
            zero_points=self.zero_points,
            half_scales=self.half_scales,
        )

    @functools.cached_property
    def tensors(self) -> dict[str, Array]:
        """Values, and what else the case has."""
        rng = np.random.default_rng([self.rows, self.columns, self.depth, self.bits, self.group])
        rows = on_grid(rng, self.rows, self.depth, self.group)
        if not self.grid:
            rows = rng.standard_normal((self.rows, self.depth), np.float32)
        shape = (*(self.leading or (self.rows,)), self.depth)
        tensors = {"values": rows.reshape(shape)}
        if self.residual:
            # The sum is the rows, exactly where they are on the grid.
            tensors["residual"] = (rng.integers(-64, 65, shape) * np.float32(2.0**-6)).astype(np.float32)
            tensors["values"] = tensors["values"] - tensors["residual"]
        if self.norm:
            tensors["norm_weight"] = rng.uniform(0.5, 1.5, self.depth).astype(np.float32)
        if self.bias:
            tensors["bias"] = rng.standard_normal(self.columns, np.float32)
        return tensors

    @property
    def sum(self) -> Array:
        """float32, as the op adds."""
        values = self.tensors["values"]
        return np.asarray(values + self.tensors["residual"] if self.residual else values)

    @property
    def expected(self) -> Approximate:
        rows = normalized(self.sum, self.tensors.get("norm_weight"), EPSILON)
        found = product(rows, self.matrix)
        bias = self.tensors.get("bias", np.zeros(1))
        return Approximate(found.value + bias, found.slack + FLOAT32_EXACT * np.abs(bias))

    def job(self, threads: tuple[int, ...] = (1, 2, 4)) -> Job:
        codes, scales, points = self.matrix.tensors
        given = self.tensors
        fed = {name: given[name] for name in ("values", "residual") if name in given}
        inputs = [("values", None), ("weight", codes), ("scales", scales), ("zero_points", points)]
        inputs += [(name, given.get(name)) for name in ("bias", "residual", "norm_weight")]
        attributes = {"N": self.columns, "K": self.depth, "bits": self.bits, "block_size": self.group}
        attributes |= {"epsilon": EPSILON}
        return Job(node_model("QuantizedLinear", inputs, attributes, fed=fed, wants_sum=self.wants_sum), fed, threads)

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.depth}x{self.columns}"
        flags = ("half_scales", "zero_points", "bias", "residual", "norm", "wants_sum", "grid")
        words = [name for name in flags if getattr(self, name)]
        return " ".join([shape, f"int{self.bits}", f"group {self.group}", *words])
