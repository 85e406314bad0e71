"""The attention kernels, run on the CPU by the emulator, against float64 PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from support import simt
from support.tolerances import BFLOAT16, FLOAT16

pytestmark = pytest.mark.skipif(bool(simt.why_missing()), reason=simt.why_missing() or "-")

DTYPES = {"float16": (torch.float16, FLOAT16), "bfloat16": (torch.bfloat16, BFLOAT16)}


@dataclass(frozen=True)
class Call:
    """One call: ``starts`` has the tokens that each row's cache holds already."""

    starts: tuple[int, ...] = (0,)
    sequence: int = 1
    capacity: int = 16
    positions: int = 64
    heads: int = 4
    kv_heads: int = 2
    size: int = 64
    window: int = 0
    scale: float = 0.125
    shift: int = 0
    """Added to a token's position: where it is turned to, not where it is stored."""

    @property
    def numbers(self) -> list[float]:
        """As the driver takes them."""
        sizes = [len(self.starts), self.sequence, self.capacity, self.positions]
        return [*sizes, self.heads, self.kv_heads, self.size, self.window, self.scale]


@dataclass(frozen=True)
class Inputs:
    """query [B, S, Hq, D], key and value [B, S, Hk, D], tables [P, D / 2], caches [B, Hk, M, D] full of garbage."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor

    @staticmethod
    def random(call: Call, dtype: torch.dtype, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        rows, angles = (
            len(call.starts),
            torch.outer(
                torch.arange(call.positions).double(),
                10000.0 ** (-torch.arange(call.size // 2).double() * 2 / call.size),
            ),
        )
        starts = torch.tensor(call.starts, dtype=torch.int32)
        steps = torch.arange(call.sequence, dtype=torch.int32)
        cache = (rows, call.kv_heads, call.capacity, call.size)
        return Inputs(
            query=draw(rows, call.sequence, call.heads, call.size),
            key=draw(rows, call.sequence, call.kv_heads, call.size),
            value=draw(rows, call.sequence, call.kv_heads, call.size),
            cos=angles.cos().to(dtype),
            sin=angles.sin().to(dtype),
            positions=starts[:, None] + steps + call.shift,
            starts=starts,
            key_cache=draw(*cache),
            value_cache=draw(*cache),
        )


def _rotate(x: torch.Tensor, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """[B, S, H, D] turned by halves, and rounded to ``dtype`` as it is stored."""
    cos, sin = (table.double()[inputs.positions.long()][:, :, None] for table in (inputs.cos, inputs.sin))
    low, high = x.double().chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(dtype).double()


def _reference(call: Call, inputs: Inputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, S, Hq, D] and both caches, float64, one query at a time."""
    query, key = _rotate(inputs.query, inputs, dtype), _rotate(inputs.key, inputs, dtype)
    keys, values = inputs.key_cache.double().clone(), inputs.value_cache.double().clone()
    output = torch.zeros(query.shape, dtype=torch.float64)
    for row, start in enumerate(call.starts):
        keys[row, :, start : start + call.sequence] = key[row].transpose(0, 1)
        values[row, :, start : start + call.sequence] = inputs.value[row].double().transpose(0, 1)
        for step in range(call.sequence):
            last = start + step
            first = max(0, last - call.window + 1) if call.window else 0
            for head in range(call.heads):
                group = head // (call.heads // call.kv_heads)
                scores = keys[row, group, first : last + 1] @ query[row, step, head] * call.scale
                output[row, step, head] = torch.softmax(scores, -1) @ values[row, group, first : last + 1]
    return output, keys, values


def _run(call: Call, inputs: Inputs, dtype: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    halves = [inputs.query, inputs.key, inputs.value, inputs.cos, inputs.sin]
    arrays = [tensor.contiguous().view(torch.int16).numpy() for tensor in halves]
    arrays += [inputs.positions.contiguous().numpy(), inputs.starts.numpy()]
    arrays += [cache.contiguous().view(torch.int16).numpy() for cache in (inputs.key_cache, inputs.value_cache)]
    raw = simt.run("attention", dtype, call.numbers, arrays, **options)
    flat = torch.from_numpy(np.frombuffer(raw, np.int16).copy()).view(DTYPES[dtype][0])
    sizes = [inputs.query.numel(), inputs.key_cache.numel(), inputs.value_cache.numel()]
    output, keys, values = flat.split(sizes)
    return output.view(inputs.query.shape), keys.view(inputs.key_cache.shape), values.view(inputs.value_cache.shape)


def _check(call: Call, dtype: str, seed: int = 0, **options: Any) -> None:
    kind, tolerance = DTYPES[dtype]
    inputs = Inputs.random(call, kind, seed)
    found, keys, values = _run(call, inputs, dtype, **options)
    expected, expected_keys, expected_values = _reference(call, inputs, kind)
    assert float((found.double() - expected).abs().max()) < tolerance * float(expected.abs().max())
    assert torch.equal(values.double(), expected_values)
    assert float((keys.double() - expected_keys).abs().max()) < tolerance * float(expected_keys.abs().max())
    for row, start in enumerate(call.starts):
        untouched = torch.ones(call.capacity, dtype=torch.bool)
        untouched[start : start + call.sequence] = False
        assert torch.equal(keys[row][:, untouched], inputs.key_cache[row][:, untouched])


CALLS = {
    "first token": Call(),
    "a prompt": Call(sequence=9),
    "decode after 63": Call(starts=(63,), capacity=80, positions=80),
    "decode after 64": Call(starts=(64,), capacity=80, positions=80),
    "decode into the last place": Call(starts=(15,)),
    "prompt that fills the cache": Call(sequence=16),
    "continued prompt": Call(starts=(5,), sequence=7),
    "rows of unequal length, one empty": Call(starts=(0, 11, 3), sequence=4),
    "positions that are not places": Call(starts=(2, 4), sequence=3, shift=30),
    "head size 128": Call(starts=(3,), sequence=2, size=128, scale=128**-0.5),
    "head size 72": Call(starts=(3,), sequence=2, size=72, scale=72**-0.5),
    "head size 256": Call(starts=(1,), sequence=2, size=256, scale=1 / 16),
    "head size 8": Call(starts=(9,), sequence=3, size=8, scale=0.4),
    "one head": Call(starts=(7,), heads=1, kv_heads=1, sequence=2),
    "one KV head of 7": Call(starts=(7,), heads=7, kv_heads=1, sequence=2),
    "one KV head of 16": Call(starts=(4,), heads=16, kv_heads=1, sequence=2),
    "as many KV heads": Call(starts=(4,), heads=8, kv_heads=8, sequence=2, size=16),
    "window of 1": Call(starts=(6,), sequence=3, window=1),
    "window of 4": Call(starts=(2, 9), sequence=5, window=4),
    "window wider than the cache": Call(starts=(2,), sequence=5, window=100),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_attention_agrees_with_float64(name: str, dtype: str) -> None:
    _check(CALLS[name], dtype, seed=len(name))


@pytest.mark.parametrize("name", ["rows of unequal length, one empty", "head size 72", "head size 8", "window of 4"])
def test_nothing_outside_the_tensors_is_touched(name: str) -> None:
    _check(CALLS[name], "bfloat16", checked=True)


@pytest.mark.parametrize("name", ["decode after 64", "continued prompt", "one KV head of 7"])
def test_every_order_of_threads_gives_the_same_bits(name: str) -> None:
    inputs = Inputs.random(CALLS[name], torch.float16, seed=2)
    first, *others = (_run(CALLS[name], inputs, "float16", schedule=number) for number in (0, 1, 2, 3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("call", [Call(sequence=0), Call(starts=())], ids=["no token", "no row"])
def test_no_token_is_no_work(call: Call) -> None:
    inputs = Inputs.random(call, torch.float16)
    output, keys, values = _run(call, inputs, "float16")
    assert output.numel() == 0
    assert torch.equal(keys, inputs.key_cache) and torch.equal(values, inputs.value_cache)


@pytest.mark.parametrize("start", [14, 16, 2**31 - 2, -1, -(2**31)])
def test_token_without_a_place_is_nan_and_is_not_stored(start: int) -> None:
    """Nothing outside the cache is written; rows and tokens that have a place are as they should be."""
    good = Call(starts=(3, 5), sequence=4)
    inputs = Inputs.random(good, torch.float16, seed=8)
    expected, expected_keys, _ = _reference(good, inputs, torch.float16)
    wrong = replace(inputs, starts=torch.tensor([start, 5], dtype=torch.int32))
    found, keys, values = _run(good, wrong, "float16", checked=True)
    for step in range(good.sequence):
        inside = 0 <= start + step < good.capacity
        assert torch.isfinite(found[0, step]).all() if inside else torch.isnan(found[0, step]).all()
    assert float((found[1].double() - expected[1]).abs().max()) < FLOAT16 * float(expected.abs().max())
    assert float((keys[1].double() - expected_keys[1]).abs().max()) < FLOAT16 * float(expected_keys.abs().max())
    stored = [place for place in range(start, start + good.sequence) if 0 <= place < good.capacity]
    kept = [place for place in range(good.capacity) if place not in stored]
    assert torch.equal(values[0][:, kept], inputs.value_cache[0][:, kept])


@pytest.mark.parametrize("position", [-1, 64, 2**31 - 1, -(2**31)])
def test_position_outside_the_tables_gives_nan(position: int) -> None:
    call = Call(starts=(3, 5), sequence=2)
    inputs = Inputs.random(call, torch.bfloat16, seed=9)
    expected, _, _ = _reference(call, inputs, torch.bfloat16)
    inputs.positions[0, 1] = position
    found, keys, _ = _run(call, inputs, "bfloat16", checked=True)
    assert torch.isnan(found[0, 1]).all() and torch.isnan(keys[0, :, 4]).all()
    for row, step in ((0, 0), (1, 0), (1, 1)):
        difference = (found[row, step].double() - expected[row, step]).abs().max()
        assert float(difference) < BFLOAT16 * float(expected.abs().max())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_those_who_see_them(value: float) -> None:
    call = Call(starts=(4,), sequence=3)
    inputs = Inputs.random(call, torch.float16, seed=10)
    clean, _, _ = _run(call, inputs, "float16")
    inputs.value[0, 1, 0, 0] = value
    found, _, _ = _run(call, inputs, "float16", checked=True)
    assert torch.equal(found[0, 0], clean[0, 0]), "an earlier token does not see it"
    assert torch.equal(found[0, :, 2:], clean[0, :, 2:]), "the heads of the other key and value head do not"
    assert not torch.isfinite(found[0, 1:, :2, 0]).any()


@pytest.mark.parametrize(
    "change",
    [{"size": 12}, {"size": 264}, {"heads": 5}, {"kv_heads": 3}, {"window": -1}],
    ids=str,
)
def test_size_that_is_not_supported_is_an_error_and_computes_nothing(change: dict[str, int]) -> None:
    call = replace(Call(sequence=2), **change)
    inputs = Inputs.random(call, torch.float16)
    with pytest.raises(simt.KernelError, match=r"^exit code 1: $"):
        _run(call, inputs, "float16")
