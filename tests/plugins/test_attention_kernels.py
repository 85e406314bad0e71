"""The attention kernels, run on the CPU by the emulator, against float64 PyTorch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from support import simt
from support.attention_cases import CACHES, DTYPES, Call, Inputs, attended, check, linear, run, turned
from support.tolerances import BFLOAT16, FLOAT16

pytestmark = pytest.mark.skipif(bool(simt.why_missing()), reason=simt.why_missing() or "-")

CALLS = {
    "first token": Call(),
    "a prompt": Call(sequence=9),
    "decode into the last place": Call(starts=(15,)),
    "prompt that fills the cache": Call(sequence=16),
    "continued prompt": Call(starts=(5,), sequence=7),
    "rows of unequal length, one empty": Call(starts=(0, 11, 3), sequence=4),
    "positions that are not places": Call(starts=(2, 4), sequence=3, shift=30),
    "head size 72": Call(starts=(3,), sequence=2, size=72, scale=72**-0.5),
    "head size 256": Call(starts=(1,), sequence=2, size=256, scale=1 / 16),
    "head size 8": Call(starts=(9,), sequence=3, size=8, scale=0.4),
    "as many KV heads": Call(starts=(4,), heads=8, kv_heads=8, sequence=2, size=16),
    "window of 1": Call(starts=(6,), sequence=3, window=1),
    "window of 4": Call(starts=(2, 9), sequence=5, window=4),
    "window wider than the cache": Call(starts=(2,), sequence=5, window=100),
    "tables of YaRN": Call(starts=(40,), sequence=3, capacity=48, yarn=4.0),
    "the last place of 131072": Call(starts=(131071,), capacity=131072, positions=131072, window=150),
    "the last places of 131072, pages": Call(
        starts=(131069,), sequence=3, capacity=131072, positions=131072, window=100, page_size=64, cache="int8"
    ),
    "few keys of many": Call(starts=(3,), capacity=4000, positions=8),
    "more parts than one": Call(starts=(2051, 700), capacity=2100, positions=2100, heads=7, kv_heads=1),
    "more parts than one, wide heads": Call(
        starts=(1000,), capacity=1001, positions=1001, heads=2, kv_heads=1, size=128
    ),
    "several stages of a warp": Call(
        starts=(1000, 900, 388, 1), sequence=1, capacity=1024, positions=1024, heads=6, size=128, path="split"
    ),
    "several stages of a warp, narrow heads": Call(
        starts=(1023,) * 12, sequence=1, capacity=1024, positions=1024, heads=2, path="split"
    ),
    "several tiles of 16": Call(
        starts=(150,), sequence=9, capacity=200, positions=200, heads=8, kv_heads=2, path="split"
    ),
    "several tiles of 128": Call(starts=(17, 0), sequence=45, capacity=64, heads=14, path="tiled"),
    "several tiles of 128, wide heads": Call(
        starts=(0, 30), sequence=70, capacity=100, positions=100, size=128, path="tiled"
    ),
    "window across tiles": Call(starts=(90,), sequence=70, capacity=160, positions=160, window=33, path="tiled"),
    "window across parts": Call(starts=(900,), capacity=1000, positions=1000, window=389, path="split"),
}
LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129)
GROUPS = (1, 2, 6, 7, 8, 14, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_attention_agrees_with_float64(name: str, dtype: str) -> None:
    check(CALLS[name], dtype, seed=len(name))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("path", ["plain", "split", "tiled"])
def test_every_length_is_attended_whole(path: str, size: int, cache: str) -> None:
    """Rows of all lengths around the edges of stages and parts, one empty, the longest one filling the cache."""
    call = Call(starts=LENGTHS, capacity=130, positions=130, size=size, heads=6, path=path, cache=cache)
    check(call, "float16", seed=size)


@pytest.mark.parametrize(("group", "size"), [(group, size) for group in GROUPS for size in (64, 128)])
def test_every_group_size(group: int, size: int) -> None:
    for path, cache in (("split", "float"), ("tiled", "int8")):
        call = Call(starts=(40, 3), sequence=2, capacity=48, heads=2 * group, size=size, path=path, cache=cache)
        if path == "tiled":
            call = replace(call, sequence=7)
        check(call, "bfloat16", seed=group)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("path", ["plain", "split", "tiled"])
@pytest.mark.parametrize("size", [64, 128])
def test_paged_cache_gives_the_bits_of_a_linear_one(size: int, path: str, cache: str) -> None:
    call = Call(starts=(70, 9, 0), sequence=5, capacity=96, positions=96, size=size, heads=6, path=path, cache=cache)
    paged = replace(call, page_size=16)
    inputs = Inputs.random(paged, torch.float16, seed=3)
    check(paged, "float16", seed=3)
    pages = inputs.pages.long()

    def unpaged(cache: torch.Tensor) -> torch.Tensor:
        rows = cache[pages].transpose(1, 2)  # [B, Hk, pages, page, D]
        return rows.reshape(call.cache_shape)

    as_linear = replace(inputs, key_cache=unpaged(inputs.key_cache), value_cache=unpaged(inputs.value_cache))
    found, expected = run(paged, inputs, "float16"), run(call, as_linear, "float16")
    assert torch.equal(found.output, expected.output)
    assert torch.equal(unpaged(found.key_cache), expected.key_cache)
    assert torch.equal(unpaged(found.value_cache), expected.value_cache)


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("path", ["split", "tiled"])
def test_every_page_size(path: str, page_size: int) -> None:
    call = Call(starts=(200, 31), sequence=3, capacity=256, positions=256, page_size=page_size, path=path, window=150)
    check(call, "bfloat16", seed=page_size)


@pytest.mark.parametrize(("packed", "norm"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_packed_and_normalized_heads(size: int, packed: bool, norm: bool) -> None:
    for dtype, cache in itertools.product(DTYPES, ("float", "int8")):
        call = Call(starts=(6, 0), sequence=3, size=size, packed=packed, norm=norm, cache=cache, heads=6)
        check(call, dtype, seed=size)


@pytest.mark.parametrize("cache", ["fp8", "int8"])
def test_quantized_cache_is_as_near_as_its_steps_allow(cache: str) -> None:
    """Against attention over what was never quantized: a weighted mean of values, each off by half a step at most, and
    weights off by what the error of their scores does to a softmax, exp(2 * error) - 1."""
    call = Call(starts=(0,), sequence=60, capacity=64, size=128, scale=128**-0.5, cache=cache)
    inputs = Inputs.random(call, torch.float16, seed=11)
    found = run(call, inputs, "float16")
    queries, keys = turned(call, inputs, keys=False), turned(call, inputs, keys=True)[0].transpose(0, 1)
    values = inputs.value[0].double().transpose(0, 1)
    padded = [torch.cat([x, x.new_zeros(call.kv_heads, 4, call.size)], 1)[None] for x in (keys, values)]
    exact = attended(call, queries, *padded)
    steps = inputs.key_scales.double() / 2, inputs.value_scales.double() / 2
    if cache == "fp8":
        steps = (keys.abs().amax(1) / 16, values.abs().amax((1, 2)) / 16)
    per_head = steps[0].repeat_interleave(call.heads // call.kv_heads, 0)
    score_error = (queries[0].abs() * per_head).sum(-1).max() * call.scale
    bound = float(steps[1].max()) + float(torch.expm1(2 * score_error)) * float(values.abs().max())
    error = float((found.output.double() - exact).abs().max())
    assert 1e-4 < error < bound + FLOAT16 * float(exact.abs().max())
    assert error < 0.15, "the bound is of the worst case: errors of many channels and keys average out"


@pytest.mark.parametrize("cache", ["fp8", "int8"])
def test_value_beyond_the_scale_is_saturated(cache: str) -> None:
    call = Call(starts=(4,), sequence=1, cache=cache)
    inputs = Inputs.random(call, torch.float16, seed=5)
    inputs.value[0, 0, 0, :4] = torch.tensor([600.0, -600.0, 65504.0, -65504.0])
    found = run(call, inputs, "float16")
    stored = linear(call, inputs, found.value_cache, keys=False)[0, 0, 4, :4] / inputs.value_scales[0]
    low, high = (-448, 448) if cache == "fp8" else (-128, 127)
    assert stored.tolist() == [high, low, high, low]


CHECKED = {
    "plain": Call(starts=(0, 11, 3), sequence=4, size=72, scale=0.1),
    "plain, quantized pages": Call(starts=(9, 0), sequence=3, size=8, cache="int8", page_size=16),
    "split": Call(starts=(0, 79), capacity=80, positions=80, heads=14, packed=True, path="split"),
    "split, quantized": Call(
        starts=(70,), sequence=3, capacity=73, positions=73, heads=7, kv_heads=1, size=128, cache="fp8"
    ),
    "parts": Call(starts=(700,), capacity=701, positions=701, heads=3, kv_heads=1, cache="int8", path="split"),
    "tiled": Call(starts=(31, 0), sequence=33, capacity=64, heads=10, norm=True, path="tiled"),
    "tiled, quantized pages": Call(
        starts=(30, 0), sequence=18, capacity=48, heads=16, size=128, cache="int8", page_size=16, path="tiled"
    ),
    "tiled, window": Call(starts=(5,), sequence=70, capacity=75, positions=75, window=20, cache="fp8", path="tiled"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_nothing_outside_the_tensors_is_touched(name: str) -> None:
    check(CHECKED[name], "bfloat16", checked=True)


@pytest.mark.parametrize("name", CHECKED)
def test_every_order_of_threads_gives_the_same_bits(name: str) -> None:
    inputs = Inputs.random(CHECKED[name], torch.float16, seed=2)
    first, *others = (run(CHECKED[name], inputs, "float16", schedule=number) for number in (0, 1, 2, 3, 7))
    assert all(first.same_bits(other) for other in others)


@pytest.mark.parametrize("call", [Call(sequence=0), Call(starts=())], ids=["no token", "no row"])
def test_no_token_is_no_work(call: Call) -> None:
    inputs = Inputs.random(call, torch.float16)
    found = run(call, inputs, "float16")
    assert found.output.numel() == 0
    assert torch.equal(found.key_cache, inputs.key_cache) and torch.equal(found.value_cache, inputs.value_cache)


BAD_PATHS = ("plain", "split", "tiled")


@pytest.mark.parametrize("path", BAD_PATHS)
@pytest.mark.parametrize("start", [14, 16, 2**31 - 2, -1, -2, -(2**31)])
def test_token_without_a_place_is_nan_and_is_not_stored(start: int, path: str) -> None:
    """Nothing outside the cache is written; rows and tokens that have a place are as they should be."""
    good = Call(starts=(3, 5), sequence=4, path=path)
    inputs = Inputs.random(good, torch.float16, seed=8)
    right = run(good, inputs, "float16")
    wrong = replace(inputs, starts=torch.tensor([start, 5], dtype=torch.int32))
    found = run(good, wrong, "float16", checked=True)
    for step in range(good.sequence):
        answers = torch.isfinite(found.output[0, step]).all()
        assert answers if 0 <= start + step < good.capacity else torch.isnan(found.output[0, step]).all()
    assert torch.equal(found.output[1], right.output[1]) and torch.equal(found.key_cache[1], right.key_cache[1])
    stored = [place for place in range(start, start + good.sequence) if 0 <= place < good.capacity]
    kept = [place for place in range(good.capacity) if place not in stored]
    assert torch.equal(found.value_cache[0][:, kept], inputs.value_cache[0][:, kept])


@pytest.mark.parametrize("path", BAD_PATHS)
@pytest.mark.parametrize("position", [-1, 64, 2**31 - 1, -(2**31)])
def test_position_outside_the_tables_gives_nan(position: int, path: str) -> None:
    call = Call(starts=(3, 5), sequence=2, path=path)
    inputs = Inputs.random(call, torch.bfloat16, seed=9)
    right = run(call, inputs, "bfloat16")
    inputs.positions[0, 1] = position
    found = run(call, inputs, "bfloat16", checked=True)
    assert torch.isnan(found.output[0, 1]).all() and torch.isnan(found.key_cache[0, :, 4]).all()
    assert torch.equal(found.output[0, 0], right.output[0, 0]) and torch.equal(found.output[1], right.output[1])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("path", BAD_PATHS)
@pytest.mark.parametrize("page", [-1, 2**31 - 1, 9, -(2**31)])
def test_page_that_does_not_exist_gives_nan_to_those_who_see_it(page: int, path: str, cache: str) -> None:
    """Row 0 begins in its second page and goes on into its third, which is missing; row 1 has all of its pages."""
    call = Call(starts=(30, 30), sequence=4, capacity=48, page_size=16, path=path, cache=cache)
    inputs = Inputs.random(call, torch.float16, seed=12)
    assert call.cache_shape[0] == 9
    right = run(call, inputs, "float16")
    inputs.pages[0, 2] = page
    found = run(call, inputs, "float16", checked=True)
    assert torch.equal(found.output[0, :2], right.output[0, :2]), "places 30 and 31 do not see the third page"
    assert torch.isnan(found.output[0, 2:]).all()
    assert torch.equal(found.output[1], right.output[1])
    inputs.pages[0, 0], inputs.pages[0, 2] = page, 0
    assert torch.isnan(run(call, inputs, "float16").output[0]).all(), "everybody sees the first page"
    windowed = replace(call, window=10)
    assert torch.isfinite(run(windowed, inputs, "float16").output[0]).all(), "nobody sees the first page"


@pytest.mark.parametrize("path", BAD_PATHS)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_reach_those_who_see_them_and_nobody_else(value: float, size: int, path: str) -> None:
    call = Call(starts=(4,), sequence=9, size=size, heads=4, kv_heads=2, path=path)
    inputs = Inputs.random(call, torch.float16, seed=10)
    clean = run(call, inputs, "float16").output
    inputs.value[0, 3, 0, 5] = value
    found = run(call, inputs, "float16", checked=True).output
    assert torch.equal(found[0, :3], clean[0, :3]), "an earlier token does not see it"
    assert torch.equal(found[0, :, 2:], clean[0, :, 2:]), "the heads of the other key and value head do not"
    assert not torch.isfinite(found[0, 3:, :2, 5]).any()
    others = [channel for channel in range(size) if channel != 5]
    assert torch.equal(found[0, :, :2, others], clean[0, :, :2, others])


@pytest.mark.parametrize("path", BAD_PATHS)
def test_nan_in_a_key_or_a_query_reaches_the_output(path: str) -> None:
    call = Call(starts=(4,), sequence=6, path=path)
    inputs = Inputs.random(call, torch.float16, seed=13)
    clean = run(call, inputs, "float16").output
    inputs.key[0, 2, 0, 0] = float("nan")
    inputs.query[0, 1, 3, 0] = float("nan")
    found = run(call, inputs, "float16").output
    assert torch.isnan(found[0, 2:, :2]).all() and torch.isnan(found[0, 1, 3]).all()
    assert torch.equal(found[0, :2, :3], clean[0, :2, :3]) and torch.equal(found[0, 2:, 2:], clean[0, 2:, 2:])


def test_nan_in_an_e4m3_cache_reaches_the_output() -> None:
    for path in BAD_PATHS:
        call = Call(starts=(9,), sequence=2, cache="fp8", path=path)
        inputs = Inputs.random(call, torch.float16, seed=14)
        inputs.value_cache[0, 1, 4, 7] = 0x7F
        found = run(call, inputs, "float16").output
        assert torch.isnan(found[0, :, 2:, 7]).all() and torch.isfinite(found[0, :, :2]).all()


@pytest.mark.parametrize("path", BAD_PATHS)
def test_large_scores_do_not_overflow(path: str) -> None:
    """A softmax that is all but a choice of one key, with scores of thousands."""
    call = Call(starts=(40,), sequence=3, capacity=48, scale=40.0, path=path)
    for dtype, (kind, tolerance) in DTYPES.items():
        inputs = Inputs.random(call, kind, seed=15)
        found = run(call, inputs, dtype)
        keys, values = (
            linear(call, inputs, c, keys=k) for c, k in ((found.key_cache, True), (found.value_cache, False))
        )
        expected = attended(call, turned(call, inputs, keys=False).to(kind).double(), keys, values)
        assert float((found.output.double() - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 12}, "head_size is 12, no multiple of 8 up to 256"),
        ({"size": 264}, "head_size is 264"),
        ({"heads": 5}, "num_heads is 5, no multiple of num_key_value_heads, 2"),
        ({"window": -1}, "sliding_window is -1, below 0"),
        ({"page_size": 8}, "page_size is 8, no power of two within 16 and 4096"),
        ({"page_size": 48, "capacity": 48}, "page_size is 48, no power of two"),
    ],
    ids=str,
)
def test_size_that_is_not_supported_is_refused_by_name(change: dict[str, int], words: str) -> None:
    call = replace(Call(sequence=2), **change)
    with pytest.raises(simt.KernelError, match=f"^exit code 1: {words}"):
        run(call, Inputs.random(call, torch.float16), "float16")


def test_path_that_a_shape_lacks_is_refused() -> None:
    for call in (Call(size=72, path="tiled"), Call(size=8, path="split"), Call(sequence=70, heads=4, path="split")):
        with pytest.raises(simt.KernelError, match=r"^exit code 1: $"):
            run(replace(call, capacity=80), Inputs.random(replace(call, capacity=80), torch.float16), "float16")


@pytest.mark.skipif(simt.ON_GPU, reason="the GPU's compute capability cannot be chosen")
def test_fp8_cache_below_sm_89_is_refused_with_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(cache="fp8")
    monkeypatch.setenv("SIMT_SM", "86")
    with pytest.raises(
        simt.KernelError, match="FP8 caches need a GPU with SM 89 or newer, this one has SM 86: use an INT8"
    ):
        run(call, Inputs.random(call, torch.float16), "float16")
    check(replace(call, cache="int8"), "float16")


def test_tolerances_would_notice_a_key_too_few() -> None:
    """The last key left out of a long row, the least that a wrong bound would do."""
    call = Call(starts=(128,), capacity=130, positions=130)
    inputs = Inputs.random(call, torch.bfloat16, seed=1)
    found = run(call, inputs, "bfloat16")
    keys, values = (linear(call, inputs, c, keys=k) for c, k in ((found.key_cache, True), (found.value_cache, False)))
    queries = turned(call, inputs, keys=False)
    whole, less = (attended(one, queries, keys, values) for one in (call, replace(call, starts=(127,))))
    assert float((whole - less).abs().max()) > 2 * BFLOAT16 * float(whole.abs().max())
