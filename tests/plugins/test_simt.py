"""The emulator finds what is planted: kernels with a bug of each kind that kernels have."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenforge.plugins.moe.packing import pack_float8, pack_int4, pack_int8
from support import simt

WHY = simt.why_missing() or ("the emulator is tested without a GPU" if simt.ON_GPU else "")
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "-")

ROUTING, EXPERTS, WEIGHTS = "moe/routing.cuh", "moe/experts.cuh", "moe/weights.cuh"


@dataclass(frozen=True)
class Case:
    """A call of the kernels: driver.cpp has the order of its numbers."""

    numbers: tuple[float, ...]
    only: int = 1


# T C I E first El Es K normalize weights group path
CASES = {
    "narrow": Case((40, 72, 24, 5, 0, 5, 1, 3, 1, 0, 65536, 2)),
    "eight": Case((8, 264, 72, 5, 0, 5, 1, 3, 1, 0, 65536, 1)),
    "wide": Case((40, 200, 136, 3, 0, 3, 0, 2, 0, 0, 65536, 3)),
    "many pairs": Case((260, 16, 16, 5, 1, 3, 1, 2, 1, 0, 65536, 1)),
    "int8": Case((20, 192, 128, 3, 0, 3, 1, 2, 1, 1, 65536, 1), only=2),
    "int4": Case((20, 320, 192, 3, 0, 3, 1, 2, 1, 2, 128, 2), only=3),
    "fp8": Case((20, 192, 128, 3, 0, 3, 1, 2, 1, 3, 65536, 2), only=4),
}

_EACH_PAIR = "    for (int32_t pair = thread; pair < pairs; pair += kSortThreads)"
_PLACE = "                int64_t const place = static_cast<int64_t>(tile.first + row)"
BUGS = {
    "barrier dropped before pairs are read": (
        "narrow",
        ROUTING,
        f"    __syncthreads();\n{_EACH_PAIR}\n    {{\n        expertOf",
        f"{_EACH_PAIR}\n    {{\n        expertOf",
    ),
    "tile counted twice": (
        "narrow",
        ROUTING,
        "positionOf[other] < positionOf[pair] ? 1 : 0;",
        "positionOf[other] <= positionOf[pair] ? 1 : 0;",
    ),
    "shuffle in divergent code of the router": (
        "narrow",
        ROUTING,
        "largest = warpMax(largest);",
        "largest = lane < 24 ? warpMax(largest) : largest;",
    ),
    "of equal logits the higher id": ("ties", ROUTING, "(equal && otherId < bestId)", "(equal && otherId > bestId)"),
    "barrier dropped between two sums": (
        "many pairs",
        ROUTING,
        "    __syncthreads();\n    int32_t const firstTile",
        "    int32_t const firstTile",
    ),
    "barrier dropped in the sort": (
        "many pairs",
        ROUTING,
        "        __syncthreads(); // everybody has read the sums of the round before\n",
        "",
    ),
    "barrier that not all threads reach": (
        "many pairs",
        ROUTING,
        "            sums[warp] = __popc(hits);\n        }\n        __syncthreads();",
        "            sums[warp] = __popc(hits);\n            __syncthreads();\n        }",
    ),
    "foreign pairs keep a position": (
        "many pairs",
        ROUTING,
        "if (expert == 0 && found < 0 && pair",
        "if (false && pair",
    ),
    "last tile forgotten": ("many pairs", ROUTING, "firstTile + ownTiles;", "firstTile + ownTiles - 1;"),
    "pairs behind the last are counted": (
        "many pairs",
        ROUTING,
        "threadIdx.x); pair < pairs;",
        "threadIdx.x); pair <= pairs;",
    ),
    "the last slot forgotten": (
        "narrow",
        ROUTING,
        "slot < routing.slots; ++slot)",
        "slot + 1 < routing.slots; ++slot)",
    ),
    "copies not waited for": ("wide", EXPERTS, "        waitForCopies<L::kStages - 2>();\n", ""),
    "copies waited for one step late": (
        "wide",
        EXPERTS,
        "waitForCopies<L::kStages - 2>",
        "waitForCopies<L::kStages - 1>",
    ),
    "barrier dropped behind the copies": (
        "wide",
        EXPERTS,
        "        __syncthreads();\n        if (step + L::kStages",
        "        if (step + L::kStages",
    ),
    "stage filled while it is read": (
        "wide",
        EXPERTS,
        "        if (step + L::kStages - 1 < steps)\n        {\n            fill(step + L::kStages - 1);",
        "        if (step + L::kStages < steps)\n        {\n            fill(step + L::kStages);",
    ),
    "rows behind the matrix are read": (
        "wide",
        EXPERTS,
        "bool const valid = firstRow + row % L::kRows < product.rows;",
        "bool const valid = true;",
    ),
    "columns behind the matrix are read": (
        "narrow",
        EXPERTS,
        "left > 0 ? (left + kColumns - 1) / kColumns : 0",
        "left > 0 ? (left + kColumns - 1) / kColumns : 1",
    ),
    "positions behind the tile are read": (
        "narrow",
        EXPERTS,
        "bool const valid = row % kTokens < tile.pairs;",
        "bool const valid = true;",
    ),
    "positions behind the tile are written": (
        "wide",
        EXPERTS,
        f"            if (row < tile.pairs)\n            {{\n{_PLACE} * product.rows",
        f"            if (true)\n            {{\n{_PLACE} * product.rows",
    ),
    "another slice writes too": ("narrow", EXPERTS, "    if (warp >= L::kRowWarps)", "    if (warp > L::kRowWarps)"),
    "slices' memory taken while stages are read": (
        "eight",
        EXPERTS,
        "    __syncthreads(); // nobody reads the stages any more, whose memory this is\n",
        "",
    ),
    "slices added before they are there": (
        "narrow",
        EXPERTS,
        "    __syncthreads();\n    if (slice == 0)",
        "    if (slice == 0)",
    ),
    "a slice forgotten": ("narrow", EXPERTS, "other = 1; other < L::kSlices", "other = 2; other < L::kSlices"),
    "memory of the inputs too small": (
        "wide",
        EXPERTS,
        "inputs[L::kSlices][kTokens][F::k",
        "inputs[L::kSlices][kTokens / 2][F::k",
    ),
    "gate and up exchanged": (
        "narrow",
        EXPERTS,
        "float const gate = sums[i][side] * gateScale;",
        "float const gate = sums[i][side + 2] * gateScale;",
    ),
    "halves of a matrix exchanged": (
        "wide",
        WEIGHTS,
        "placeOf<4>(row, 2 * k + lane / 16)",
        "placeOf<4>(row, 2 * k + 1 - lane / 16)",
    ),
    "chunks put where they are not looked for": (
        "wide",
        EXPERTS,
        "placeOf<F::kInputChunks>(thread / F::kInputChunks % kTokens, ",
        "placeOf<F::kInputChunks>(thread / F::kInputChunks % 4, ",
    ),
    "bytes of the other pair": (
        "int8",
        WEIGHTS,
        "0x64646464u, kFirst ? 0x4140u : 0x4342u",
        "0x64646464u, kFirst ? 0x4342u : 0x4140u",
    ),
    "scale of the gate for up": (
        "int8",
        EXPERTS,
        "tile.expert, gateRow + 8, inputScale)",
        "tile.expert, gateRow, inputScale)",
    ),
    "zero point of the nibbles": ("int4", WEIGHTS, "0x64086408u", "0x64076407u"),
    "scale of another row": (
        "int4",
        EXPERTS,
        "toFloat(scales[ownRow + lane / 4 + 8])",
        "toFloat(scales[ownRow + lane / 4])",
    ),
    "scales of the first slice for all": (
        "int4",
        EXPERTS,
        "(firstScaleStep + step) >> product.groupShift",
        "step >> product.groupShift",
    ),
    "scale of the tokens forgotten": ("fp8", EXPERTS, "quantized ? product.activationScales[0] : 1.0f", "1.0f"),
    "scale of another expert": (
        "fp8",
        EXPERTS,
        "kFloat8 ? product.activationScales[1 + tile.expert] : 1.0f;\n#pragma",
        "kFloat8 ? product.activationScales[1] : 1.0f;\n#pragma",
    ),
}
CASES["ties"] = CASES["narrow"]


@functools.cache
def _tensors(name: str) -> list[np.ndarray]:
    case, generator = CASES[name], np.random.default_rng(0)

    def draw(*size: int) -> np.ndarray:
        return generator.normal(0, 0.5, size).astype(np.float16)

    tokens, hidden, width, experts, _, local, shared, _, _, kind, group, _ = (int(number) for number in case.numbers)
    stored = local + shared
    matrices = [draw(stored, 2 * width, hidden), draw(stored, hidden, width)]
    logits = draw(tokens, experts)
    if name == "ties":
        logits[:] = 1
    tensors = [draw(tokens, hidden), logits]
    if kind == 0:
        return [*tensors, *matrices, draw(tokens, 1)]
    wide = [matrix.astype(np.float32) for matrix in matrices]
    match kind:
        case 1:
            packed = [pack_int8(matrix) for matrix in wide]
        case 2:
            packed = [pack_int4(matrix, group) for matrix in wide]
        case _:
            packed = [pack_float8(matrix) for matrix in wide]
    tensors += [packed[0][0], packed[1][0], draw(tokens, 1), packed[0][1], packed[1][1]]
    return tensors if kind < 3 else [*tensors, np.linspace(0.01, 0.02, 1 + stored, dtype=np.float32)]


def _run(name: str, **options: Any) -> bytes:
    case = CASES[name]
    return simt.run("moe", "float16", case.numbers, _tensors(name), only=case.only, **options)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, tmp_path: Path) -> None:
    """By the emulator or a sanitizer, or because an order of threads gives other bits than the right kernel."""
    case, file, old, new = BUGS[name]
    right = _run(case)
    sources = simt.changed_sources(tmp_path, file, old, new)
    assert any(
        _is_caught(case, right, sources, schedule, checked)
        for checked in (False, True)  # the sanitizers take longest to compile
        for schedule in (0, 2, 3, 4)
    )


def _is_caught(case: str, right: bytes, sources: Path, schedule: int, checked: bool) -> bool:
    try:
        return _run(case, schedule=schedule, checked=checked, sources=sources) != right
    except simt.KernelError as error:
        return "do not compile" not in str(error)


@pytest.mark.parametrize("case", CASES)
def test_right_kernels_are_not_accused(case: str) -> None:
    right = _run(case)
    for schedule in (0, 2, 3, 4):
        assert _run(case, schedule=schedule, checked=True) == right


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "barrier that not all threads reach",
            r"deadlock: 8 threads wait at a barrier, 248 in a collective of their warp, 0 are done",
        ),
        ("rows behind the matrix are read", "AddressSanitizer: heap-"),
        ("positions behind the tile are written", "AddressSanitizer: heap-"),
    ],
)
def test_report_says_what_is_wrong(name: str, words: str, tmp_path: Path) -> None:
    case, file, old, new = BUGS[name]
    with pytest.raises(simt.KernelError, match=words):
        _run(case, checked=True, sources=simt.changed_sources(tmp_path, file, old, new))
