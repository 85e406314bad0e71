"""QuantizedLinear in ONNX Runtime, with each instruction set, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from support.cpu_linear_case import LinearCase
from support.cpu_reference import Approximate, half_step, product
from support.cpu_runs import Answer, Job, node_model
from support.tolerances import FLOAT32_EXACT

BITS = (4, 8)
GROUPS = (16, 32, 64, 128, 512)
ROWS = (1, 2, 3, 4, 5, 12, 13, 37, 300)


def _forms() -> list[LinearCase]:
    """Every bits, group and count of rows, beside which everything else takes turns with periods of its own."""
    found = []
    for i, (bits, group, rows) in enumerate(itertools.product(BITS, GROUPS, ROWS)):
        residual, norm = i // 2 % 2 == 1, i % 3 == 1
        found.append(
            LinearCase(
                bits=bits,
                group=group,
                rows=rows,
                columns=(100, 32, 1, 33, 160, 31, 64)[i % 7],
                depth=(200, 64, 129, 384, 16, 250, 100, 1, 272, 128, 31)[i % 11],
                leading={12: (3, 4), 300: (5, 6, 10), 4: (4, 1), 1: (1, 1, 1)}.get(rows, ()) if i % 2 else (),
                half_scales=i % 5 not in (1, 4),
                zero_points=i // 3 % 2 == 1,
                bias=i // 4 % 3 == 1,
                residual=residual,
                norm=norm,
                wants_sum=i // 4 % 2 == 0 and (residual or i % 8 == 1),
                grid=i // 2 % 3 != 2 and not norm,
            )
        )
    # Wide ones: several items for each thread.
    found += [
        LinearCase(bits=bits, rows=rows, columns=1100, depth=64, zero_points=True) for bits in BITS for rows in (1, 7)
    ]
    return found


CASES = {str(case): case for case in _forms()}
IDENTITY = replace(LinearCase(rows=9, columns=256, depth=256, group=64), grid=False)


def _identity() -> Job:
    """The product by 1 shows the rounded activations themselves."""
    codes = np.full((256, 256), 8, np.uint8)
    np.fill_diagonal(codes, 9)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    fed = {"values": IDENTITY.tensors["values"]}
    inputs = [("values", None), ("weight", packed), ("scales", np.ones((256, 4), np.float32))]
    attributes = {"N": 256, "K": 256, "bits": 4, "block_size": 64, "epsilon": 0.0}
    return Job(node_model("QuantizedLinear", inputs, attributes, fed=fed), fed)


def _spoiled(value: float) -> Job:
    """Row 3 has ``value`` once, in the second of its groups."""
    job = LinearCase(rows=6, grid=False).job((2,))
    values = job.feeds["values"].copy()
    values[3, 40] = value
    return replace(job, feeds={"values": values})


def _extremes() -> Job:
    """Rows of zeros, of the smallest and of almost the greatest numbers."""
    job = LinearCase(rows=4, grid=False).job((2,))
    values = job.feeds["values"].copy()
    values[0], values[1], values[2] = 0, values[1] * np.float32(1e-41), values[2] * np.float32(1e37)
    return replace(job, feeds={"values": values})


JOBS = {
    **{name: case.job() for name, case in CASES.items()},
    "identity": _identity(),
    "nan": _spoiled(np.nan),
    "infinity": _spoiled(np.inf),
    "extremes": _extremes(),
    "no rows": replace(LinearCase().job((2,)), feeds={"values": np.zeros((0, 200), np.float32)}),
}


def test_cases_have_every_combination_of_what_kernels_branch_on() -> None:
    """Bits, the form of scales, zero points and how many rows are left over together choose a kernel's code."""
    seen = {(case.bits, case.half_scales, case.zero_points) for case in CASES.values()}
    assert len(seen) == 8
    assert {(case.residual, case.norm, case.wants_sum) for case in CASES.values()} >= {
        (True, True, True),
        (True, True, False),
        (True, False, True),
        (True, False, False),
        (False, True, True),
        (False, True, False),
        (False, False, True),
    }
    for few in (True, False):
        prologues = {(case.residual, case.norm) for case in CASES.values() if (case.rows <= 4) == few}
        assert len(prologues) == 4
        assert {case.bias for case in CASES.values() if (case.rows <= 4) == few and case.columns % 32 == 0} == {
            True,
            False,
        }


@pytest.mark.parametrize("name", CASES)
def test_linear_is_the_product_by_the_dequantized_matrix(name: str, answers: Mapping[str, Answer]) -> None:
    """Tight: on the grid only fp32's rounding is left; the same bits with 1, 2 and 4 threads, twice each."""
    case = CASES[name]
    outputs = answers[name].outputs
    expected = case.expected
    expected.check(outputs[0])
    if case.grid:
        size = np.abs(case.sum.astype(np.float64)) @ np.abs(case.matrix.dequantized).T
        assert np.median(expected.slack / (size + 1)) < 1e-4, "the tolerance says nothing"
    if case.wants_sum:
        np.testing.assert_array_equal(outputs[1], case.sum)
    else:
        assert len(outputs) == 1


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not (case.grid or case.norm)])
def test_random_activations_cost_half_a_step_each(name: str, answers: Mapping[str, Answer]) -> None:
    case = CASES[name]
    bound = half_step(case.sum, case.matrix)
    bias = case.tensors.get("bias", np.zeros(1))
    Approximate(bound.value + bias, bound.slack + FLOAT32_EXACT * np.abs(bias)).check(answers[name].outputs[0])


def test_activations_are_rounded_to_the_nearest_of_255_numbers(answers: Mapping[str, Answer]) -> None:
    values = IDENTITY.tensors["values"]
    found = answers["identity"].outputs[0]
    step = np.abs(values.reshape(9, 4, 64)).max(-1).repeat(64, -1) / 127
    assert (np.abs(found - values) <= step * (0.5 + 1e-4)).all()
    codes = found / step
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert np.abs(codes).max() == pytest.approx(127)


@pytest.mark.parametrize("name", ["nan", "infinity"])
def test_what_is_no_number_stays_in_its_row(name: str, answers: Mapping[str, Answer]) -> None:
    found = answers[name].outputs[0]
    assert not np.isfinite(found[3]).any(), "every output reads it"
    case = LinearCase(rows=6, grid=False)
    others = [0, 1, 2, 4, 5]
    case.expected[others].check(found[others])


def test_rows_of_zeros_and_of_extreme_numbers(answers: Mapping[str, Answer]) -> None:
    found = answers["extremes"].outputs[0]
    values = JOBS["extremes"].feeds["values"]
    assert not found[0].any()
    assert np.abs(found[1]).max() < 1e-36
    product(Approximate.exactly(values[2:]), LinearCase().matrix).check(found[2:])


def test_no_rows_give_no_rows(answers: Mapping[str, Answer]) -> None:
    assert answers["no rows"].outputs[0].shape == (0, 100)
