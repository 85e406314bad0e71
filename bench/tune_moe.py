"""Measures which tiles of the experts' kernels are fastest on this GPU, and writes the table: opt-in, never needed.

    python bench/tune_moe.py            prints what it would write
    python bench/tune_moe.py --write    writes plugins/moe/tactics/sm<NN>.inc, to be compiled in

It makes its own routing, uniform and skewed, because what a builder feeds the kernels with is meaningless. Of all
thresholds it takes those whose largest loss against the best path, over every shape it measured, is the smallest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenforge.bench.gpu_clock import Machine
from qwenforge.bench.kernel_library import PLUGINS, build
from qwenforge.bench.kernels import QUICK_ROUNDS, add_compiler_options, kernels_for, moe_rows, require_gpu
from qwenforge.bench.moe_layers import KINDS, LAYERS, ROUTINGS

TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)
ENUMERATORS = {"float": "kFloat", "int8": "kInt8", "int4": "kInt4", "fp8": "kFloat8"}
"""Of WeightType, by the name of a weight type."""


@dataclass(frozen=True)
class Sample:
    """Microseconds of every path that could run, for so many tokens of a layer."""

    tokens: int
    pairs_of_expert: float
    """On average, of the stored experts."""
    times: dict[str, float]


@dataclass(frozen=True)
class Thresholds:
    """A row of the table: moe/tactics/tactics.h says what the numbers mean."""

    eight_up_to: int
    sixteen_up_to: int
    grouped_from: int

    def choose(self, sample: Sample) -> str:
        """The path that the library takes."""
        if sample.tokens <= self.eight_up_to:
            return "eight"
        if self.grouped_from and sample.tokens >= self.grouped_from and "grouped" in sample.times:
            return "grouped"
        return "sixteen" if sample.pairs_of_expert <= self.sixteen_up_to else "wide"


def regret(thresholds: Thresholds, samples: Sequence[Sample]) -> float:
    """The largest loss of the chosen path against the best one, 0.1 for 10 %; infinite where it was not measured."""
    return max(
        sample.times.get(thresholds.choose(sample), float("inf")) / min(sample.times.values()) - 1 for sample in samples
    )


def best_thresholds(samples: Sequence[Sample]) -> Thresholds:
    """Those of the smallest regret, and among equals the smallest numbers.

    Raises:
        ValueError: there is nothing to choose from.
    """
    if not samples:
        raise ValueError("nothing was measured")
    tokens = sorted({sample.tokens for sample in samples})
    averages = sorted({int(sample.pairs_of_expert) for sample in samples})
    grouped = [count for count in tokens if any("grouped" in s.times for s in samples if s.tokens == count)]
    candidates = (
        Thresholds(eight, sixteen, start)
        for eight in [0, *(count for count in tokens if count <= 64)]
        for sixteen in [0, *averages]
        for start in [0, *grouped]
    )
    return min(candidates, key=lambda c: (regret(c, samples), c.eight_up_to, c.sixteen_up_to, c.grouped_from))


def table_line(sm: int, weight_type: str, thresholds: Thresholds, source: str) -> str:
    """A line of sm<NN>.inc."""
    return (
        f"{{/*sm*/ {sm}, WeightType::{ENUMERATORS[weight_type]}, /*eightUpTo*/ {thresholds.eight_up_to}, "
        f"/*sixteenUpTo*/ {thresholds.sixteen_up_to}, /*groupedFrom*/ {thresholds.grouped_from}}}, // source: {source}"
    )


def samples_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Sample]]:
    """By weight type, from the rows of bench/kernels.py; peers' times are left out."""
    layers = {layer.name: layer for layer in LAYERS}
    kinds = {kind.name: kind for kind in KINDS}
    found: dict[str, list[Sample]] = {weight_type: [] for weight_type in ENUMERATORS}
    for row in rows:
        if "times" not in row:
            continue
        layer = layers[row["layer"]]
        pairs = row["tokens"] * (layer.top_k + layer.shared) / layer.stored
        times = {
            name: time["us"]["median"]
            for name, time in row["times"].items()
            if name in ("eight", "sixteen", "wide", "grouped")
        }
        found[kinds[row["weights"]].weight_type].append(Sample(row["tokens"], pairs, times))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, decide, print and maybe write; 1 where there is no GPU or no compiler."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="write plugins/moe/tactics/sm<NN>.inc")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="decide from this JSON of bench/kernels.py instead")
    add_compiler_options(parser)
    args = parser.parse_args(arguments)
    if args.rows is not None:
        report = json.loads(args.rows.read_text(encoding="utf-8"))
        rows, sm, gpu = report["moe"], report["sm"], report["gpu"]
    else:
        torch = require_gpu(args.nvcc)
        with tempfile.TemporaryDirectory() as folder:
            print("compiling", flush=True)
            kernels = kernels_for(torch, build(args.nvcc, Path(folder), args.cutlass))
            machine = Machine(torch, QUICK_ROUNDS)
            rows = []
            for row in moe_rows(machine, kernels, LAYERS, KINDS, TOKENS, ROUTINGS, peers=False):
                rows.append(row)
                print(f"{len(rows)} measured: {row['layer']} {row['weights']} {row.get('tokens', '')}", flush=True)
        sm, gpu = machine.sm, machine.name
    lines = []
    for weight_type, samples in samples_of(rows).items():
        if samples:
            chosen = best_thresholds(samples)
            loss = f"at most {100 * regret(chosen, samples):.0f} % behind the best path"
            lines.append(table_line(sm, weight_type, chosen, f"bench/tune_moe.py on {gpu}, {loss}"))
            print(lines[-1])
        else:
            old = (PLUGINS / "moe" / "tactics" / f"sm{sm}.inc").read_text(encoding="utf-8").splitlines()
            lines += [line for line in old if f"::{ENUMERATORS[weight_type]}," in line]
    if args.write:
        target = PLUGINS / "moe" / "tactics" / f"sm{sm}.inc"
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"written: {target.relative_to(PLUGINS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
