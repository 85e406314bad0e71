"""``bench/kernels.py`` from layer to report without a GPU: emulated kernels, and a stand-in for torch's CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qwenforge.bench.kernels import moe_rows
from qwenforge.bench.moe_layers import KINDS, ROUTINGS, Kind, Layer
from support import emulated_kernels, simt
from support.gpu_script import summary
from support.torch_stand_in import StandIn, machine

WHY = simt.why_missing() or ("without a GPU" if simt.ON_GPU else "")
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "-")

LAYERS = (Layer("plain", 64, 128, 5, 3, 0, normalize=True), Layer("shared", 128, 64, 6, 2, 2))


@pytest.mark.parametrize(
    ("layer", "kinds", "tokens", "routings"),
    [(LAYERS[0], KINDS, (2, 21), ["skewed"]), (LAYERS[1], KINDS[:1], (8,), ROUTINGS)],
    ids=["every kind", "shared experts"],
)
def test_rows_have_every_path_and_peer_or_the_reason(
    layer: Layer, kinds: Sequence[Kind], tokens: Sequence[int], routings: Sequence[str]
) -> None:
    torch.manual_seed(1)
    rows = list(moe_rows(machine(StandIn()), emulated_kernels.kernels(), [layer], kinds, tokens, routings))
    assert len(rows) == len(kinds) * len(tokens) * len(routings)
    for row in rows:
        assert {"eight", "sixteen", "wide"} <= row["times"].keys() and row["bits_changed"] == []
        assert row["left_out"]["grouped"] == "the kernels (grouped) returned CUDA error 801"
        assert row["times"]["wide"]["us"] == {"median": 1000.0, "low": 1000.0, "high": 1000.0}
        assert row["times"]["wide"]["percent_of_floor"] == pytest.approx(row["floor_us"] / 10)
        assert sum("_difference" in name for name in row) == 3 and summary().wrong(row) == []
        peers = {"torch grouped_mm", "transformers batched_mm", "transformers grouped_mm", "transformers eager"}
        assert (peers <= row["times"].keys()) == (row["weights"] == "bf16")
        waiting = {"transformers eager": "it waits for the device"} if row["weights"] == "bf16" else {}
        assert row["not_replayed"] == waiting
        words = summary().summary_line(row)
        assert words.startswith(f"{layer.name} {row['weights']} T={row['tokens']} {row['routing']}: ")
        assert "% of floor" in words and ("1.00x" in words) == (row["weights"] == "bf16")


def test_what_cannot_be_captured_is_left_out_or_called_instead() -> None:
    def refuse(graph: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    (row,) = moe_rows(machine(StandIn(refuse)), emulated_kernels.kernels(), LAYERS[:1], KINDS[:1], (2,), ("skewed",))
    assert {"eight", "sixteen", "wide"}.isdisjoint(row["times"])
    assert row["left_out"]["wide"].startswith("cannot be captured in a CUDA graph: operation not permitted")
    assert "torch grouped_mm" in row["times"] and "capturing" in row["not_replayed"]["torch grouped_mm"]
    assert "none of our paths ran" in summary().summary_line(row)
