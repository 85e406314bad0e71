"""Compensated rounding: against the one-column-at-a-time definition in float64, and what it is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwenforge.calibration.gptq import WIDEST, CompensatedRounding, channel_blocks

Array = np.ndarray[Any, Any]


def round_with_compensation(
    weight: Array, moments: Array, scales: Array, *, weight_format: Any, group_size: int, damping: float = 0.01
) -> Array:
    steps = np.repeat(scales, group_size, -1)
    return CompensatedRounding(moments, damping).round(weight, steps, weight_format)


def inputs_and_weight(tokens: int, columns: int, rows: int) -> tuple[Array, Array]:
    """Correlated inputs, as a layer's are, and a weight."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((columns // 4, columns)) + 0.1 * generator.standard_normal((1, columns))
    inputs = generator.standard_normal((tokens, columns // 4)) @ mixing
    inputs += 0.3 * generator.standard_normal((tokens, columns))
    return inputs, generator.standard_normal((rows, columns)).astype(np.float32)


def group_scales(weight: Array, group_size: int, largest: int) -> Array:
    groups = np.abs(weight).reshape(len(weight), -1, group_size).max(-1)
    return (groups / largest).astype(np.float32)


def output_error(inputs: Array, weight: Array, codes: Array, scales: Array, group_size: int) -> float:
    values = codes * np.repeat(scales.astype(np.float64), group_size, -1)
    return float(np.square(inputs @ (weight - values).T).sum())


def by_definition(weight: Array, moments: Array, scales: Array, group_size: int) -> Array:
    """Optimal brain quantization in a fixed order: the remaining columns solve their least squares problem anew."""
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(len(moments))
    order = np.argsort(-np.diag(moments), kind="stable")
    steps = np.repeat(scales.astype(np.float64), group_size, -1)
    current, codes = weight.astype(np.float64), np.zeros(weight.shape)
    for place, column in enumerate(order):
        codes[:, column] = np.clip(np.rint(current[:, column] / steps[:, column]), -8, 7)
        error = current[:, column] - codes[:, column] * steps[:, column]
        rest = order[place + 1 :]
        if len(rest):
            answer = np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, column])
            current[:, rest] += np.outer(error, answer)
    return codes


def test_codes_are_those_of_the_definition() -> None:
    inputs, weight = inputs_and_weight(512, 160, 12)
    moments, scales = inputs.T @ inputs, group_scales(weight, 32, 7)
    codes = round_with_compensation(weight, moments, scales, weight_format="int4", group_size=32)
    assert np.array_equal(codes, by_definition(weight, moments, scales, 32))


def test_error_of_outputs_is_a_fraction_of_rounding_to_nearest() -> None:
    inputs, weight = inputs_and_weight(2048, 256, 64)
    scales = group_scales(weight, 64, 7)
    nearest = np.clip(np.rint(weight / np.repeat(scales, 64, -1)), -8, 7)
    codes = round_with_compensation(weight, inputs.T @ inputs, scales, weight_format="int4", group_size=64)
    fresh, _ = inputs_and_weight(4096, 256, 1)
    found, plain = (output_error(fresh, weight, each, scales, 64) for each in (codes, nearest))
    assert found < 0.5 * plain


def test_uncorrelated_inputs_give_rounding_to_nearest() -> None:
    _, weight = inputs_and_weight(8, 64, 16)
    scales = group_scales(weight, 64, 127)
    codes = round_with_compensation(weight, np.eye(64), scales, weight_format="int8", group_size=64)
    assert np.array_equal(codes, np.rint(weight / scales))


def test_channels_never_seen_are_rounded_to_nearest() -> None:
    inputs, weight = inputs_and_weight(512, 64, 16)
    inputs[:, 5] = inputs[:, 40] = 0
    scales = group_scales(weight, 32, 7)
    codes = round_with_compensation(weight, inputs.T @ inputs, scales, weight_format="int4", group_size=32)
    nearest = np.clip(np.rint(weight / np.repeat(scales, 32, -1)), -8, 7)
    assert np.array_equal(codes[:, [5, 40]], nearest[:, [5, 40]])


def test_moments_of_few_tokens_can_be_factored() -> None:
    inputs, weight = inputs_and_weight(3, 64, 4)
    scales = group_scales(weight, 64, 7)
    codes = round_with_compensation(weight, inputs.T @ inputs, scales, weight_format="int4", group_size=64, damping=0.0)
    assert np.abs(codes).max() <= 8


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (WIDEST, 1), (WIDEST + 1, 2), (18944, 3)])
def test_channel_blocks_are_as_few_as_memory_allows(channels: int, count: int) -> None:
    blocks = channel_blocks(channels)
    assert len(blocks) == count
    assert [channel for block in blocks for channel in range(block.start, block.stop)] == list(range(channels))
    assert max(block.stop - block.start for block in blocks) <= WIDEST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_format": "fp8"}, "not a signed integer"),
        ({"group_size": 16}, "do not fit"),
        ({"moments": np.full((64, 64), np.nan)}, "not finite"),
    ],
)
def test_impossible_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    inputs, weight = inputs_and_weight(128, 64, 4)
    arguments: dict[str, Any] = {
        "moments": inputs.T @ inputs,
        "scales": group_scales(weight, 32, 7),
        "weight_format": "int4",
        "group_size": 32,
    }
    with pytest.raises(ValueError, match=message):
        round_with_compensation(weight, **{**arguments, **change})
