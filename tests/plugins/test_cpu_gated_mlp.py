"""QuantizedGatedMlp in ONNX Runtime, with each instruction set, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from support.cpu_gated_mlp_case import GatedMlpCase
from support.cpu_runs import Answer, Job


def _forms() -> list[GatedMlpCase]:
    found = []
    rows = (1, 2, 4, 5, 12, 13, 37)
    for i, (bits, down_bits, count) in enumerate(itertools.product((4, 8), (4, 8), rows)):
        found.append(
            GatedMlpCase(
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
    # Wide ones: many tiles for each thread.
    found += [GatedMlpCase(bits=bits, rows=rows, hidden=64, inner=1700) for bits in (4, 8) for rows in (1, 6)]
    found += [
        GatedMlpCase(bits=bits, rows=rows, up_float_scales=True, zero_points=bits == 8)
        for bits in (4, 8)
        for rows in (1, 6)
    ]
    return found


CASES = {str(case): case for case in _forms()}
PLAIN = GatedMlpCase(rows=6)


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
