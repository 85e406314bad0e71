"""The rules that logits are judged by, on logits made up for each: bounds, near ties, strays, divergence, NaN."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qwenforge.engine.verification import FP16, FP16_ROUTED, FP32, Comparison, Tolerance, tolerance

Logits = npt.NDArray[np.float32]
RULES = pytest.mark.parametrize("rule", [FP32, FP16, FP16_ROUTED], ids=["fp32", "fp16", "fp16_routed"])


def rows(count: int, *logits: float) -> Logits:
    """``count`` equal rows."""
    return np.tile(np.array(logits, np.float32), (count, 1))


def compared(rule: Tolerance, *pairs: tuple[Logits, Logits]) -> Comparison:
    comparison = Comparison(rule)
    for index, (reference, ours) in enumerate(pairs):
        comparison.add(reference, ours, f"call {index}")
    return comparison


def test_rule_follows_dtype_and_experts() -> None:
    for routed in (True, False):
        assert tolerance(ir.DataType.FLOAT, routed=routed) is FP32
        assert tolerance(ir.DataType.BFLOAT16, routed=routed) is FP32, "bf16 is computed in fp32"
    assert tolerance(ir.DataType.FLOAT16, routed=False) is FP16
    assert tolerance(ir.DataType.FLOAT16, routed=True) is FP16_ROUTED


@RULES
def test_equal_logits_agree_and_none_at_all_do_not(rule: Tolerance) -> None:
    same = rows(3, 1.0, 5.0, -2.0)
    assert compared(rule, (same, same)).ok
    assert not compared(rule).ok, "nothing compared proves nothing"


@pytest.mark.parametrize("rule", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_bound_is_sharp(rule: Tolerance, sign: int) -> None:
    reference = rows(1, 0.0, 9.0)
    within, beyond = (reference + rows(1, sign * rule.bound * factor, 0.0) for factor in (0.999, 1.001))
    assert compared(rule, (reference, within)).ok
    refused = compared(rule, (reference, beyond))
    assert not refused.ok
    assert (refused.strays, refused.positions) == (1, 1)
    assert refused.max_abs_error == pytest.approx(rule.bound * 1.001, rel=1e-3)
    assert refused.scaled_bound == rule.bound


@pytest.mark.parametrize("largest", [-3 * FP32.logit_scale, 3 * FP32.logit_scale])
def test_bound_grows_with_logits_beyond_the_scale(largest: float) -> None:
    reference = rows(1, largest, 0.0, 3 * FP32.logit_scale)
    off = rows(1, 0.0, 2.9 * FP32.bound, 0.0)
    assert compared(FP32, (reference, reference + off)).ok
    assert not compared(FP32, (reference / 3, reference / 3 + off)).ok


def test_one_position_beyond_the_bound_is_too_many_in_fp32() -> None:
    reference = rows(1000, 0.0, 9.0)
    ours = reference.copy()
    ours[777, 0] += 2 * FP32.bound
    comparison = compared(FP32, (reference[:700], ours[:700]), (reference[700:], ours[700:]))
    assert not comparison.ok
    assert (comparison.strays, comparison.positions, comparison.worst) == (1, 1000, "call 1")


@RULES
def test_as_many_positions_may_stray_as_the_rule_says(rule: Tolerance) -> None:
    reference = rows(200, -9.0, 9.0)
    most = round(rule.stray_positions * 200)
    for strays in {most, min(most + 1, 200)}:
        ours = reference.copy()
        ours[:strays, 0] += 2 * rule.bound
        comparison = compared(rule, (reference, ours))
        assert comparison.strays == strays
        assert comparison.ok == (strays <= most)


@RULES
def test_another_choice_is_a_near_tie_only_within_twice_the_bound(rule: Tolerance) -> None:
    for gap, is_near in ((1.9 * rule.bound, True), (2.1 * rule.bound, False)):
        reference, ours = rows(1, 5.0, 5.0 - gap, -10.0), rows(1, 5.0 - gap, 5.0, -10.0)
        comparison = compared(rule, (reference, ours))
        assert (comparison.near_ties, comparison.disagreements) == (int(is_near), int(not is_near))


def test_near_tie_within_the_bound_is_accepted() -> None:
    reference = rows(1, 5.0, 5.0 - 0.5 * FP32.bound)
    swapped = rows(1, 5.0 - 0.5 * FP32.bound, 5.0)
    comparison = compared(FP32, (reference, swapped))
    assert comparison.ok and comparison.near_ties == 1


@RULES
def test_as_many_tokens_may_differ_as_the_rule_says(rule: Tolerance) -> None:
    # Enough equal candidates that a changed choice hardly moves the distribution, so that only the choice counts.
    reference = np.full((100, 4000), 1.0, np.float32)
    reference[:, 0] += np.float32(2.2 * rule.bound)
    allowed = Tolerance(10 * rule.bound, 16.0, 1.0, rule.stray_tokens, rule.mean_kl)
    strict = Tolerance(rule.bound, 16.0, 1.0, rule.stray_tokens, rule.mean_kl)
    most = round(rule.stray_tokens * 100)
    for changed in (most, most + 1):
        ours = reference.copy()
        ours[:changed, 1] += np.float32(3 * rule.bound)
        comparison = compared(strict, (reference, ours))
        assert comparison.disagreements == changed
        assert comparison.ok == (changed <= most)
        assert compared(allowed, (reference, ours)).near_ties == changed


@pytest.mark.parametrize(("rule", "within", "beyond"), [(FP16, 0.14, 0.155), (FP16_ROUTED, 0.4, 0.5)])
def test_mean_divergence_is_bounded_in_16_bits(rule: Tolerance, within: float, beyond: float) -> None:
    """Two even candidates, moved apart by 2d: KL = log(cosh(d))."""
    assert rule.mean_kl is not None
    reference = rows(10, 0.0, 0.0)
    for move, ok in ((within, True), (beyond, False)):
        comparison = compared(rule, (reference, reference + rows(10, move, -move)))
        assert comparison.mean_kl == pytest.approx(np.log(np.cosh(np.float64(np.float32(move)))), rel=1e-6)
        assert (comparison.mean_kl <= rule.mean_kl) == ok
        assert comparison.ok == ok


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_divergence_is_that_of_the_definition(scale: float) -> None:
    generator = np.random.default_rng(6)
    reference = (scale * generator.standard_normal((20, 50))).astype(np.float32)
    ours = (reference + 0.1 * generator.standard_normal((20, 50))).astype(np.float32)
    p, q = (np.exp(logits.astype(np.float64)) for logits in (reference, ours))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = (p * np.log(p / q)).sum(1)
    comparison = compared(FP32, (reference, ours))
    assert comparison.mean_kl == pytest.approx(expected.mean(), rel=1e-9)
    assert comparison.kl_max == pytest.approx(expected.max(), rel=1e-9)


def test_divergence_of_huge_logits_is_finite_and_of_equal_ones_zero() -> None:
    huge = rows(1, 1e4, -1e4, 9e3)
    comparison = compared(FP32, (huge, huge))
    assert (comparison.mean_kl, comparison.kl_max) == (0.0, 0.0)
    assert compared(FP32, (huge, huge[:, ::-1])).mean_kl == pytest.approx(1e3)
    # A shift of all logits changes no probability, and rounding must not make it less than nothing.
    assert 0.0 <= compared(FP32, (huge / 1e4, huge / 1e4 + 7)).mean_kl < 1e-12


@RULES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "ours"])
def test_value_that_is_not_finite_is_never_accepted(rule: Tolerance, value: float, side: str) -> None:
    good, bad = rows(50, 1.0, 2.0), rows(50, 1.0, 2.0)
    bad[17, 0] = value
    comparison = compared(rule, (good, good), (bad, good) if side == "reference" else (good, bad))
    assert comparison.non_finite and not comparison.ok
    assert comparison.worst == "call 1"
    assert comparison.positions == 99
