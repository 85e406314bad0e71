"""The layout of packed expert weights, against rows placed one by one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.graph_passes.lower.expert_packing import pack_down, pack_gate_up, shared_slices

HIDDEN = 24


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(("routed", "shared"), [(16, 0), (16, 16), (16, 40), (24, 8), (8, 64)])
def test_every_row_stands_where_the_layout_puts_it(routed: int, shared: int, dtype: type[np.generic]) -> None:
    generator = np.random.default_rng(routed + shared)
    experts, slices = 3, -(-shared // routed)
    gate_up = generator.normal(size=(experts, 2 * routed, HIDDEN)).astype(dtype)
    down = generator.normal(size=(experts, HIDDEN, routed)).astype(dtype)
    merged = generator.normal(size=(HIDDEN, 2 * shared)).astype(dtype)
    shared_down = generator.normal(size=(shared, HIDDEN)).astype(dtype)
    more = shared_slices(ir.tensor(merged), ir.tensor(shared_down), routed) if shared else None
    first = np.asarray(pack_gate_up(ir.tensor(gate_up), more).numpy())
    second = np.asarray(pack_down(ir.tensor(down), more).numpy())
    assert first.shape == (experts + slices, 2 * routed, HIDDEN) and second.shape == (experts + slices, HIDDEN, routed)
    assert first.dtype == second.dtype == np.dtype(dtype)
    for expert in range(experts + slices):
        for channel in range(routed):
            row = channel // 8 * 16 + channel % 8
            if expert < experts:
                gate, up = gate_up[expert, channel], gate_up[expert, routed + channel]
                column = down[expert, :, channel]
            else:
                place = (expert - experts) * routed + channel
                inside = place < shared
                gate = merged[:, place] if inside else np.zeros(HIDDEN, dtype)
                up = merged[:, shared + place] if inside else np.zeros(HIDDEN, dtype)
                column = shared_down[place] if inside else np.zeros(HIDDEN, dtype)
            np.testing.assert_array_equal(first[expert, row], gate)
            np.testing.assert_array_equal(first[expert, row + 8], up)
            np.testing.assert_array_equal(second[expert, :, channel], column)
