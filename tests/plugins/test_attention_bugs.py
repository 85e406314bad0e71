"""Bugs planted in the attention kernels, each found by what the kernels' own tests do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support import simt
from support.attention_cases import Call, Inputs, check, run

WHY = simt.why_missing() or ("bugs are planted in the emulator" if simt.ON_GPU else "")
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "-")

APPEND, CACHE, PLAIN = "attention/append.cuh", "attention/cache.cuh", "attention/plain.cuh"
TILING, PRODUCTS, TILES = "attention/tiling.cuh", "attention/products.cuh", "attention/tiles.cuh"
SPLIT, TILED = "attention/split.cuh", "attention/tiled.cuh"
SPLIT_LAUNCH, LAUNCH = "attention/split.cu", "attention/attention.cu"

CALLS = {
    "plain": Call(starts=(2, 7), sequence=3, size=72),
    "plain, window": Call(starts=(9,), sequence=3, size=72, window=5),
    "split": Call(starts=(40, 79), capacity=80, positions=80, heads=12),
    "split, wide": Call(starts=(60,), sequence=2, capacity=62, size=128, heads=14, path="split"),
    "long rows": Call(starts=(500,) * 7 + (388,), capacity=512, positions=512, heads=4, size=128, path="split"),
    "parts": Call(starts=(700,), capacity=701, positions=701, heads=3, kv_heads=1),
    "parts, int8": Call(starts=(600,), sequence=9, capacity=640, positions=640, heads=8, cache="int8", path="split"),
    "tiled": Call(starts=(31, 0), sequence=40, capacity=80, positions=80, heads=14, path="tiled"),
    "tiled, window": Call(starts=(60,), sequence=70, capacity=130, positions=130, heads=2, window=33, path="tiled"),
    "tiled, long": Call(starts=(200,), sequence=70, capacity=270, positions=270, heads=2, path="tiled"),
    "packed": Call(starts=(3, 0), sequence=3, packed=True, norm=True, size=128, heads=6),
    "int8": Call(starts=(30, 9), sequence=3, capacity=40, size=128, heads=6, cache="int8"),
    "fp8": Call(starts=(30, 9), sequence=20, capacity=64, heads=14, cache="fp8", path="tiled"),
    "pages": Call(starts=(30, 9), sequence=3, capacity=48, page_size=16),
}


def _later_nan(**options: Any) -> None:
    """NaN in the value of a later token, in the same 16 keys."""
    for path in ("split", "tiled"):
        call = Call(starts=(4,), sequence=9, heads=2, path=path)
        inputs = Inputs.random(call, torch.float16, seed=10)
        clean = run(call, inputs, "float16", **options).output
        inputs.value[0, 3, 0, 5] = float("nan")
        found = run(call, inputs, "float16", **options).output
        assert torch.equal(found[0, :3], clean[0, :3]) and torch.isnan(found[0, 3:, 0, 5]).all()


def _missing_page(**options: Any) -> None:
    """A page that does not exist, seen by some tokens."""
    call = Call(starts=(30, 30), sequence=4, capacity=48, page_size=16)
    inputs = Inputs.random(call, torch.float16, seed=12)
    inputs.pages[0, 2] = 1000
    output = run(call, inputs, "float16", **options).output
    assert torch.isfinite(output[0, :2]).all() and torch.isnan(output[0, 2:]).all() and torch.isfinite(output[1]).all()


def _saturated(**options: Any) -> None:
    call = Call(starts=(4,), cache="int8")
    inputs = Inputs.random(call, torch.float16, seed=5)
    inputs.value[0, 0, 0, :2] = torch.tensor([600.0, -600.0])
    assert run(call, inputs, "float16", **options).value_cache[0, 0, 4, :2].tolist() == [127, -128]


PROBES: dict[str, Callable[..., None]] = {
    "later NaN": _later_nan,
    "missing page": _missing_page,
    "saturated": _saturated,
}

BUGS = {
    "turned the other way": ("plain", APPEND, "low * cos - high * sin", "low * cos + high * sin"),
    "mean over the wrong number": ("packed", APPEND, "/ static_cast<float>(headSize)", "/ 64.0f"),
    "norm of the other weight": ("packed", APPEND, "isQuery ? call.queryNorm : call.keyNorm", "call.queryNorm"),
    "values turned too": ("plain", APPEND, "if (isQuery || isKey)", "if (true)"),
    "packed tokens too close": ("packed", LAUNCH, "queryWidth + 2 * keyValueWidth", "queryWidth + keyValueWidth"),
    "one scale for a head's keys": (
        "int8",
        APPEND,
        "call.keyScales[head * call.headSize + channel]",
        "call.keyScales[head * call.headSize]",
    ),
    "scales of another head": ("int8", APPEND, "head / call.group * call.headSize", "head % 2 * call.headSize"),
    "scale of values forgotten": ("int8", APPEND, "1.0f : call.valueScales[head];", "1.0f : 1.0f;"),
    "collective that not all lanes reach": (
        "missing page",
        APPEND,
        "    return __ballot_sync(kAllLanes, missing) == 0;",
        "    return !missing && __ballot_sync(kAllLanes, missing) == 0;",
    ),
    "pages are not looked for": (
        "missing page",
        APPEND,
        "bool const answers = seesItsPages(call, row, place);",
        "bool const answers = place >= 0;",
    ),
    "page id not bounded": ("missing page", CACHE, "return page < pages ? page : -1;", "return page;"),
    "rounded towards zero": ("int8", CACHE, "rintf(value / scale)", "truncf(value / scale)"),
    "not saturated": ("saturated", CACHE, "fminf(fmaxf(units, -128.0f), 127.0f)", "units"),
    "slot of another page": ("pages", CACHE, "place & (pageTokens - 1)", "(place + 1) & (pageTokens - 1)"),
    "window one too wide": ("plain, window", CACHE, "place - window + 1 : 0", "place - window : 0"),
    "barrier dropped before the merge": (
        "plain",
        PLAIN,
        "    __syncthreads();\n\n    float largest",
        "    float largest",
    ),
    "shuffle in divergent code": ("plain", PLAIN, "warpSum(score);", "lane < 24 ? warpSum(score) : score;"),
    "channels behind the head are read": (
        "plain",
        PLAIN,
        "queries[i] = channel < call.headSize ? ",
        "queries[i] = channel < 1000 ? ",
    ),
    "another group of heads": ("plain", PLAIN, "head / call.group;", "head % call.keyValueHeads;"),
    "one key too few": ("plain", PLAIN, "key <= place;", "key < place;"),
    "copies waited for one turn late": ("long rows", TILES, "waitForCopies<kStages - 2>", "waitForCopies<kStages - 1>"),
    "warps do not wait for their copies": ("int8", TILES, "        synchronize<kThreads>();\n", ""),
    "blocks do not wait for their copies": ("tiled, long", TILES, "        synchronize<kThreads>();\n", ""),
    "stage filled while it is read": (
        "tiled, long",
        TILES,
        "        synchronize<kThreads>();\n        fill(turn + kStages - 1);",
        "        fill(turn + kStages - 1);\n        synchronize<kThreads>();",
    ),
    "queries not waited for": (
        "split",
        TILES,
        "    waitForCopies<0>();\n    __syncthreads();\n}\n\n// The first",
        "    waitForCopies<0>();\n}\n\n// The first",
    ),
    "key behind the last is read": ("split", TILES, "page = key < keys.end ?", "page = key <= keys.end ?"),
    "a token does not see itself": ("split", TILING, "behind >= 0 && behind < window", "behind > 0 && behind < window"),
    "window ends too early": (
        "tiled, window",
        TILING,
        "behind >= 0 && behind < window",
        "behind >= 0 && behind + 1 < window",
    ),
    "mask left out too early": ("tiled", TILING, "key + count - 1 <= allLast", "key <= allLast"),
    "mask left out where a window begins": ("tiled, window", TILING, "return key >= allFirst && key", "return key"),
    "seen keys skipped": ("tiled, window", TILING, "key + count > someFirst", "key > someFirst"),
    "sum not rescaled": ("long rows", PRODUCTS, "            sums.values[tile][n][2 * half + 1] *= kept;\n", ""),
    "weights not rescaled": ("long rows", PRODUCTS, "sums.weight[tile][half] * kept;", "sums.weight[tile][half];"),
    "maximum of half of the keys": (
        "split",
        PRODUCTS,
        "__shfl_xor_sync(kAllLanes, maximum, 2)",
        "__shfl_xor_sync(kAllLanes, maximum, 1)",
    ),
    "weights of half of the keys": ("split", TILING, "sum += __shfl_xor_sync(kAllLanes, sum, 2);", ""),
    "second chunk of queries twice": (
        "split",
        PRODUCTS,
        "lane % 16, 2 * step + lane / 16)",
        "lane % 16, 2 * step + 1)",
    ),
    "keys of the next eight": ("split, wide", PRODUCTS, "8 * n + lane / 16 * 8 + lane % 8", "8 * n + lane % 8"),
    "values of other channels": (
        "tiled",
        PRODUCTS,
        "2 * n + lane / 16, /*isValue=*/true",
        "2 * n + lane / 8 % 2, /*isValue=*/true",
    ),
    "values of one key twice": ("int8", PRODUCTS, "(index + 4u) * 0x1100u", "index * 0x1100u"),
    "8-bit values as if they were wide": (
        "int8",
        TILING,
        "n / 8 * 64 + 8 * column + n % 8 : 8 * n + column",
        "8 * n + column : 8 * n + column",
    ),
    "8-bit keys of another step": ("fp8", PRODUCTS, "+ step % 2 * 8);", "+ 0);"),
    "bias of INT8": ("int8", PRODUCTS, "(pair & 0x00ff00ffu) ^ 0x64806480u", "(pair & 0x00ff00ffu) ^ 0x64006400u"),
    "NaN of others kept": ("later NaN", PRODUCTS, "if (!seenByAll)", "if (false)"),
    "NaN of its own lost": ("later NaN", PRODUCTS, "sum = counts[j] > 0.0f ? NAN : sum;", "sum = sum;"),
    "row of another head": (
        "tiled",
        TILES,
        "head * call.group + (row < rows ? row % call.group : 0)",
        "head * call.group",
    ),
    "rings not left": ("split", SPLIT, "    __syncthreads(); // nobody needs", "    // nobody needs"),
    "warps' parts not waited for": (
        "split",
        SPLIT,
        "    __syncthreads();\n    float const scale",
        "    float const scale",
    ),
    "last key of the last part": ("parts", SPLIT, "from + keys : sight.someLast + 1;", "from + keys : sight.someLast;"),
    "warps take the same keys": ("split", SPLIT, "+ warp * L::kKeys;", "+ warp / 2 * L::kKeys;"),
    "parts of the first tile": (
        "parts, int8",
        SPLIT,
        "(keyHead * tiles + row / kSplitRows) * splits",
        "keyHead * tiles * splits",
    ),
    "parts not rescaled": ("parts", SPLIT, "weight += weights[split] * shares[split];", "weight += weights[split];"),
    "scale of values forgotten by the parts": (
        "parts, int8",
        SPLIT,
        "valueScale(call, head) / weight",
        "1.0f / weight",
    ),
    "one thread too few": ("parts", SPLIT_LAUNCH, "dim3(kMergeThreads), stream", "dim3(kMergeThreads / 2), stream"),
    "last key of a tile": ("tiled", TILED, "last >= 0 ? last + 1 : 0", "last >= 0 ? last : 0"),
    "window of the last row for all": ("tiled, window", TILED, "lowest < 0 ? 0 : lowest", "last"),
    "all warps see as the first one": (
        "tiled",
        TILED,
        "batchRow, firstRow + ownRow, rows);",
        "batchRow, firstRow, rows);",
    ),
    "8-bit channels in the order of wide ones": ("fp8", TILED, "L::kIsByte ? n : n + e;", "n + e;"),
}


def _probe(name: str, **options: Any) -> None:
    if name in PROBES:
        PROBES[name](**options)
    else:
        check(CALLS[name], "float16", **options)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, tmp_path: Path) -> None:
    case, file, old, new = BUGS[name]
    sources = simt.changed_sources(tmp_path, file, old, new)
    # The sanitizers take longest to compile.
    attempts = [(schedule, checked) for checked in (False, True) for schedule in (0, 3, 2, 4)]
    assert any(_is_caught(case, schedule=schedule, checked=checked, sources=sources) for schedule, checked in attempts)


def _is_caught(case: str, **options: Any) -> bool:
    try:
        _probe(case, **options)
    except AssertionError:
        return True
    except simt.KernelError as error:
        return "do not compile" not in str(error)
    return False


def test_report_of_a_divergent_collective_says_who_waits(tmp_path: Path) -> None:
    case, file, old, new = BUGS["shuffle in divergent code"]
    words = r"deadlock: \d+ threads wait at a barrier, \d+ in a collective of their warp, 0 are done"
    with pytest.raises(simt.KernelError, match=words):
        _probe(case, sources=simt.changed_sources(tmp_path, file, old, new))


@pytest.mark.parametrize("case", [*CALLS, *PROBES])
def test_right_kernels_are_not_accused(case: str) -> None:
    for schedule in (0, 2, 3, 4):
        _probe(case, schedule=schedule, checked=True)


def test_unequal_orders_of_threads_are_told_apart() -> None:
    """What every_order_of_threads_gives_the_same_bits relies on: other inputs give other bits."""
    call = replace(CALLS["split"], starts=(40, 41))
    one, other = (run(call, Inputs.random(call, torch.float16, seed=seed), "float16") for seed in (1, 2))
    assert not one.same_bits(other)
