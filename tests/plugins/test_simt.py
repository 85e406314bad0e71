"""The emulator finds what is planted: kernels with a bug of each kind that kernels have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support import simt

WHY = simt.why_missing() or ("the emulator is tested without a GPU" if simt.ON_GPU else "")
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "-")

MOE, ATTENTION = "moe/moe_kernels.cuh", "attention/attention_kernels.cuh"
MATRIX = "moe/moe_mma_kernels.cuh"
_MOE_NUMBERS = [40, 72, 24, 5, 1, 3, 1, 0]
_ATTENTION_NUMBERS = [2, 3, 16, 32, 4, 2, 72, 0, 0.125]

BUGS = {
    "barrier dropped before products": (
        MOE,
        "        }\n        __syncthreads();\n#pragma unroll 8",
        "        }\n#pragma unroll 8",
    ),
    "barrier dropped behind products": (
        MOE,
        "            }\n        }\n        __syncthreads();\n    }\n}\n\n// A block computes 32",
        "            }\n        }\n    }\n}\n\n// A block computes 32",
    ),
    "barrier dropped in the sort": (
        MOE,
        "        __syncthreads(); // everybody has read the sums of the round before\n",
        "",
    ),
    "barrier that not all threads reach": (
        MOE,
        "            sums[warp] = __popc(hits);\n        }\n        __syncthreads();",
        "            sums[warp] = __popc(hits);\n            __syncthreads();\n        }",
    ),
    "barrier dropped before the merge": (
        ATTENTION,
        "    __syncthreads();\n\n    float largest",
        "    float largest",
    ),
    "shuffle in divergent code": (
        ATTENTION,
        "        score = warpSum(score);",
        "        score = lane < 24 ? warpSum(score) : score;",
    ),
    "rows behind the weights are read": (MOE, "if (inside && row < validRows)", "if (inside)"),
    "columns behind the tensor are read": (
        MOE,
        "bool const inside = start + column < depth;",
        "bool const inside = true;",
    ),
    "channels behind the head are read": (
        ATTENTION,
        "query[i] = channel < call.headSize ? toFloat(call.rotated[row + channel]) * call.scale : 0.0f;",
        "query[i] = toFloat(call.rotated[row + channel]) * call.scale;",
    ),
    "shared memory too small": (
        MOE,
        "float weights[kTileRows][kTileDepth + 1];",
        "float weights[kTileRows - 1][kTileDepth];",
    ),
    "gate and up exchanged": (
        MOE,
        "hiddenSize, gateRow, gateRow + 8, gate, up);",
        "hiddenSize, gateRow + 8, gateRow, gate, up);",
    ),
    "copies not waited for": (MATRIX, "        waitForCopies<kMmaStages - 2>();\n", ""),
    "copies waited for one step late": (MATRIX, "waitForCopies<kMmaStages - 2>", "waitForCopies<kMmaStages - 1>"),
    "barrier dropped behind the copies": (
        MATRIX,
        "        __syncthreads();\n        if (step + kMmaStages",
        "        if (step + kMmaStages",
    ),
    "stage filled while it is read": (
        MATRIX,
        "        if (step + kMmaStages - 1 < steps)\n        {\n            fill(step + kMmaStages - 1);",
        "        if (step + kMmaStages < steps)\n        {\n            fill(step + kMmaStages);",
    ),
    "halves of a matrix exchanged": (MATRIX, "[k + lane / 16 * 8]);", "[k + (1 - lane / 16) * 8]);"),
    "rows behind the matrix are read": (
        MATRIX,
        "valid[i] = isWeight ? row < validRows : row - kMmaRows < validInputs;",
        "valid[i] = isWeight ? true : row - kMmaRows < validInputs;",
    ),
    "other group of heads": (
        ATTENTION,
        "int32_t const keyHead = head / (call.heads / call.keyValueHeads);",
        "int32_t const keyHead = head % call.keyValueHeads;",
    ),
    "one key too few": (ATTENTION, "key <= place;", "key < place;"),
    "the last slot forgotten": (MOE, "slot < routing.slots; ++slot", "slot + 1 < routing.slots; ++slot"),
}


def _inputs(file: str) -> tuple[str, list[float], list[np.ndarray]]:
    generator = np.random.default_rng(0)

    def draw(*size: int) -> np.ndarray:
        return generator.normal(0, 0.5, size).astype(np.float16)

    if file in (MOE, MATRIX):
        tokens, hidden, width, experts, shared = (int(number) for number in _MOE_NUMBERS[:5])
        stored = experts + shared
        tensors = [draw(tokens, hidden), draw(tokens, experts), draw(stored, 2 * width, hidden)]
        numbers = [*_MOE_NUMBERS[:-1], int(file == MATRIX)]
        return "moe", numbers, [*tensors, draw(stored, hidden, width), draw(tokens, 1)]
    rows, sequence, capacity, positions, heads, kv_heads, size = (int(number) for number in _ATTENTION_NUMBERS[:7])
    tensors = [draw(rows, sequence, heads, size), *(draw(rows, sequence, kv_heads, size) for _ in range(2))]
    tensors += [draw(positions, size // 2), draw(positions, size // 2)]
    starts = np.array([2, 7], np.int32)
    tensors += [(starts[:, None] + np.arange(sequence)).astype(np.int32), starts]
    return "attention", _ATTENTION_NUMBERS, tensors + [draw(rows, kv_heads, capacity, size) for _ in range(2)]


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, tmp_path: Path) -> None:
    """By the emulator or a sanitizer, or because an order of threads gives other bits than the right kernel."""
    file, old, new = BUGS[name]
    op, numbers, tensors = _inputs(file)
    right = simt.run(op, "float16", numbers, tensors)
    sources = simt.changed_sources(tmp_path, file, old, new)
    assert any(
        _is_caught(op, numbers, tensors, right, sources, schedule, checked)
        for checked in (False, True)  # the sanitizers take longest to compile
        for schedule in (0, 1, 2)
    )


def _is_caught(
    op: str, numbers: list[float], tensors: list[np.ndarray], right: bytes, sources: Path, schedule: int, checked: bool
) -> bool:
    try:
        return simt.run(op, "float16", numbers, tensors, schedule=schedule, checked=checked, sources=sources) != right
    except simt.KernelError as error:
        return "do not compile" not in str(error)


def test_right_kernels_are_not_accused() -> None:
    for file in (MOE, MATRIX, ATTENTION):
        op, numbers, tensors = _inputs(file)
        right = simt.run(op, "float16", numbers, tensors)
        for schedule in (0, 1, 2):
            assert simt.run(op, "float16", numbers, tensors, schedule=schedule, checked=True) == right


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "barrier that not all threads reach",
            r"deadlock: 8 threads wait at a barrier, 0 in a collective of their warp, 248 are done",
        ),
        (
            "shuffle in divergent code",
            r"deadlock: \d+ threads wait at a barrier, \d+ in a collective of their warp, 0 are done",
        ),
        ("rows behind the weights are read", "heap-buffer-overflow"),
        ("shared memory too small", "heap-buffer-overflow|out of bounds"),
    ],
)
def test_report_says_what_is_wrong(name: str, words: str, tmp_path: Path) -> None:
    file, old, new = BUGS[name]
    op, numbers, tensors = _inputs(file)
    with pytest.raises(simt.KernelError, match=words):
        simt.run(op, "float16", numbers, tensors, checked=True, sources=simt.changed_sources(tmp_path, file, old, new))
