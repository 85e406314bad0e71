"""QuantizedGatedMlp in ONNX Runtime, with each instruction set, against float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest

from support.cpu_reference import Approximate, Array, Stored, mlp, normalized, on_grid
from support.cpu_runs import Answer, Job, node_model

EPSILON = 1e-6


@dataclass(frozen=True)
class Case:
    """``hidden`` and ``inner`` are the two widths; gate and up have one form, down its own."""

    bits: int = 4
    group: int = 32
    down_bits: int = 4
    down_group: int = 32
    rows: int = 1
    hidden: int = 96
    inner: int = 160
    leading: tuple[int, ...] = ()
    half_scales: bool = True
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
            form(self.inner, self.hidden, self.bits, self.group, zero_points=self.zero_points, seed=2),
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
        flags = ("half_scales", "zero_points", "residual", "norm", "wants_sum")
        words = [name for name in flags if getattr(self, name)]
        forms = f"int{self.bits} by {self.group}, int{self.down_bits} by {self.down_group}"
        return " ".join([f"{self.rows}x{self.hidden}x{self.inner}", forms, *words])


def _forms() -> list[Case]:
    found = []
    rows = (1, 2, 4, 5, 12, 13, 37)
    for i, (bits, down_bits, count) in enumerate(itertools.product((4, 8), (4, 8), rows)):
        found.append(
            Case(
                bits=bits,
                down_bits=down_bits,
                rows=count,
                group=(32, 16, 64, 128, 256)[i % 5],
                down_group=(64, 32, 16, 512, 128)[i % 4],
                hidden=(96, 100, 64, 33, 16, 130)[i % 6],
                inner=(160, 72, 31, 200, 32)[i // 2 % 5],
                leading=(2, 2) if count == 4 and i % 2 else (),
                half_scales=i % 3 != 2,
                zero_points=i // 3 % 2 == 1,
                residual=i // 2 % 2 == 1,
                norm=i % 5 in (1, 2),
                wants_sum=i % 3 == 0,
            )
        )
    # Wide ones: several tiles in an item, and several items for each thread.
    found += [Case(bits=bits, rows=rows, hidden=64, inner=1700) for bits in (4, 8) for rows in (1, 6)]
    return found


CASES = {str(case): case for case in _forms()}
PLAIN = Case(rows=6)


def _spoiled(rows: int) -> Job:
    job = replace(PLAIN, rows=rows).job((2,))
    values = job.feeds["values"].copy()
    values[1, 40] = np.nan
    return replace(job, feeds={"values": values})


JOBS = {
    **{name: case.job() for name, case in CASES.items()},
    "nan in few rows": _spoiled(3),
    "nan in many rows": _spoiled(6),
    "no rows": replace(
        replace(PLAIN, rows=4, leading=(2, 2)).job((2,)), feeds={"values": np.zeros((2, 0, 96), np.float32)}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mlp_is_silu_of_gate_by_up_by_down(name: str, answers: Mapping[str, Answer]) -> None:
    case = CASES[name]
    outputs = answers[name].outputs
    case.expected.check(outputs[0])
    if case.wants_sum:
        np.testing.assert_array_equal(outputs[1], case.sum)


def test_reference_is_certain_in_most_cases() -> None:
    """An MLP's inner activations lie near an edge now and then, not always."""
    certain = [np.median(case.expected.slack) / np.abs(case.expected.value).max() < 1e-4 for case in CASES.values()]
    assert np.mean(certain) > 0.5, certain


@pytest.mark.parametrize("rows", [3, 6])
def test_nan_stays_in_its_row(rows: int, answers: Mapping[str, Answer]) -> None:
    found = answers["nan in few rows" if rows == 3 else "nan in many rows"].outputs[0]
    assert np.isnan(found[1]).all()
    others = [row for row in range(rows) if row != 1]
    replace(PLAIN, rows=rows).expected[others].check(found[others])


def test_no_rows_give_no_rows(answers: Mapping[str, Answer]) -> None:
    assert answers["no rows"].outputs[0].shape == (2, 0, 96)
