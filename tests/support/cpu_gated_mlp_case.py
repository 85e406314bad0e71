"""One QuantizedGatedMlp: its model, its inputs and its answer in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from support.cpu_reference import Approximate, Array, Stored, mlp, normalized, on_grid
from support.cpu_runs import Job, node_model

EPSILON = 1e-6


@dataclass(frozen=True)
class GatedMlpCase:
    """``hidden`` and ``inner`` are the two widths; gate and up have one form, down its own.

    ``up_float_scales``: up's scales are no halves whatever gate's are, so that their tiles differ in size.
    """

    bits: int = 4
    group: int = 32
    down_bits: int = 4
    down_group: int = 32
    rows: int = 1
    hidden: int = 96
    inner: int = 160
    leading: tuple[int, ...] = ()
    half_scales: bool = True
    up_float_scales: bool = False
    zero_points: bool = False
    residual: bool = False
    norm: bool = False
    wants_sum: bool = False

    @functools.cached_property
    def matrices(self) -> tuple[Stored, Stored, Stored]:
        """Gate, up and down; each its own zero points or none."""
        form = functools.partial(Stored.random, half_scales=self.half_scales)
        return (
            form(self.inner, self.hidden, self.bits, self.group, zero_points=self.zero_points, seed=1),
            form(
                self.inner,
                self.hidden,
                self.bits,
                self.group,
                half_scales=self.half_scales and not self.up_float_scales,
                zero_points=self.zero_points,
                seed=2,
            ),
            form(self.hidden, self.inner, self.down_bits, self.down_group, zero_points=not self.zero_points, seed=3),
        )

    @functools.cached_property
    def tensors(self) -> dict[str, Array]:
        rng = np.random.default_rng([self.rows, self.hidden, self.inner, self.bits])
        shape = (*(self.leading or (self.rows,)), self.hidden)
        tensors = {"values": on_grid(rng, self.rows, self.hidden, self.group).reshape(shape)}
        if self.residual:
            tensors["residual"] = (rng.integers(-64, 65, shape) * np.float32(2.0**-6)).astype(np.float32)
            tensors["values"] = tensors["values"] - tensors["residual"]
        if self.norm:
            tensors["norm_weight"] = rng.uniform(0.5, 1.5, self.hidden).astype(np.float32)
        return tensors

    @property
    def sum(self) -> Array:
        values = self.tensors["values"]
        return np.asarray(values + self.tensors["residual"] if self.residual else values)

    @property
    def expected(self) -> Approximate:
        return mlp(normalized(self.sum, self.tensors.get("norm_weight"), EPSILON), *self.matrices)

    def job(self, threads: tuple[int, ...] = (1, 2, 4)) -> Job:
        given = self.tensors
        fed = {name: given[name] for name in ("values", "residual") if name in given}
        inputs: list[tuple[str, Array | None]] = [("values", None)]
        for name, matrix in zip(("gate", "up", "down"), self.matrices, strict=True):
            places = (name, f"{name}_scales", f"{name}_zero_points")
            inputs += zip(places, matrix.tensors, strict=True)
        inputs += [(name, given.get(name)) for name in ("residual", "norm_weight")]
        attributes = {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "bits": self.bits,
            "block_size": self.group,
            "down_bits": self.down_bits,
            "down_block_size": self.down_group,
            "epsilon": EPSILON,
        }
        model = node_model("QuantizedGatedMlp", inputs, attributes, fed=fed, wants_sum=self.wants_sum)
        return Job(model, fed, threads)

    def __str__(self) -> str:
        flags = ("half_scales", "up_float_scales", "zero_points", "residual", "norm", "wants_sum")
        words = [name for name in flags if getattr(self, name)]
        forms = f"int{self.bits} by {self.group}, int{self.down_bits} by {self.down_group}"
        return " ".join([f"{self.rows}x{self.hidden}x{self.inner}", forms, *words])
