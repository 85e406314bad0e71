from __future__ import annotations

import numpy as np
import pytest

from qwenforge.runtime.prefill import PrefillStep, plan_prefill


def test_plan_groups_short_prompts_and_splits_long_ones() -> None:
    assert list(plan_prefill([2, 3, 4, 9, 25], 12)) == [
        PrefillStep(0, 3, 0, 4),
        PrefillStep(3, 1, 0, 9),
        PrefillStep(4, 1, 0, 12),
        PrefillStep(4, 1, 12, 24),
        PrefillStep(4, 1, 24, 25),
    ]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("chunk", [1, 5, 16, 512])
def test_plan_covers_every_token_once_within_chunk(seed: int, chunk: int) -> None:
    random = np.random.default_rng(seed)
    lengths = sorted(random.integers(1, 60, random.integers(1, 12)).tolist())
    done = [0] * len(lengths)
    for step in plan_prefill(lengths, chunk):
        assert step.rows * (step.stop - step.start) <= chunk
        assert step.start == 0 or step.rows == 1
        for row in range(step.first_row, step.first_row + step.rows):
            assert done[row] == step.start
            done[row] = min(step.stop, lengths[row])
    assert done == lengths
