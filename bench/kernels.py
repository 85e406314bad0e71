"""Times the plugins' kernels on this machine's GPU beside their peers: ``python -P bench/kernels.py moe --json FILE``.

Needs torch with CUDA and nvcc. Contenders take turns, replayed as CUDA graphs with a cold L2; medians with the 10th and
90th percentile, in microseconds. A floor is the larger of bytes over the copy bandwidth and operations over the bf16
matrix rate, both measured in the same run. Experts (``moe``): everybody computes the same layer from the router's
logits on. Attention (``attention``): torch's only attends, ours also turn the heads and append to the cache. (``-P``
keeps this folder off Python's path: transformers would take kernels.py for a package of that name.)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from qwenforge.bench.attention_layers import CACHES, HEADS, PREFILL_WORKS, Cache, Heads, Work, decode_works
from qwenforge.bench.attention_report import paths_to_change, targets
from qwenforge.bench.attention_rows import attention_rows
from qwenforge.bench.gpu_clock import Contenders, Machine
from qwenforge.bench.kernel_library import PATHS, Kernels, build
from qwenforge.bench.moe_layers import (
    KINDS,
    LAYERS,
    ROUTINGS,
    Kind,
    Layer,
    floor_us,
    make_call,
    make_experts,
    reference,
)

_Named = TypeVar("_Named", Kind, Layer, Cache, Heads)
ROUNDS = 15
QUICK_ROUNDS = 5
TOKENS = (1, 8, 64, 512, 4096)
WORKS: dict[str, list[Work]] = {"decode": decode_works(), "prefill": PREFILL_WORKS}
REFERENCE_TOKENS = 8
"""Up to so many tokens the result is compared with fp32 of the unpacked weights."""


def moe_rows(
    machine: Machine,
    kernels: Kernels,
    layers: Sequence[Layer],
    kinds: Sequence[Kind],
    tokens: Sequence[int],
    routings: Sequence[str],
    *,
    peers: bool = True,
) -> Iterator[dict[str, Any]]:
    """One row a layer, kind of weights, number of tokens and routing.

    A row has ``times`` of every path and peer that could run, and in ``left_out`` why the others could not; in
    ``not_replayed`` peers that were called and not replayed, because they cannot be captured; how far our paths are
    from a reference (few tokens) or from each other; in ``bits_changed`` the paths, of which there should be none,
    whose replays gave other bits than the first call.
    """
    torch = machine.torch
    for layer in layers:
        for kind in kinds:
            if kind.weight_type == "fp8" and machine.sm < 89:
                yield {"layer": layer.name, "weights": kind.name, "left_out": f"FP8 needs SM 89, this is {machine.sm}"}
                continue
            experts = make_experts(torch, layer, kind)
            for count in tokens:
                for routing in routings:
                    yield _moe_row(machine, kernels, layer, kind, count, routing, experts, peers)
            del experts
            torch.cuda.empty_cache()


def _moe_row(
    machine: Machine, kernels: Kernels, layer: Layer, kind: Kind, tokens: int, routing: str, experts: Any, peers: bool
) -> dict[str, Any]:
    torch = machine.torch
    call = make_call(torch, layer, tokens, routing)
    floor, bound = floor_us(layer, kind, tokens, call.touched, machine.bandwidth, machine.rate)
    row: dict[str, Any] = {
        "layer": layer.name,
        "weights": kind.name,
        "tokens": tokens,
        "routing": routing,
        "floor_us": floor,
        "bound": bound,
        "table": kernels.moe_path(call.hidden, call.logits, experts, torch.empty_like(call.hidden), call.gates),
    }
    contenders = Contenders()
    left_out = contenders.left_out
    calls: dict[str, Callable[[], Any]] = {}
    outputs = {}
    for path in PATHS:
        if path == "table" or (path in ("eight", "sixteen") and tokens > 512):
            continue  # the table's choice is one of the others; small tiles read a weight too often by then
        output = torch.empty_like(call.hidden)
        try:
            ours = kernels.prepared_moe(call.hidden, call.logits, experts, output, call.gates, path)
            ours()
        except Exception as error:  # noqa: BLE001 - the reason goes into the report
            left_out[path] = str(error)
            continue
        calls[path], outputs[path] = ours, output
    if peers and kind.weight_type == "float":
        for name, peer in _peers(torch, layer, call, experts).items():
            if isinstance(peer, str):
                left_out[name] = peer
            else:
                calls[name] = peer
    torch.cuda.synchronize()
    contenders.capture(machine, calls, outputs)
    once = {path: output.clone() for path, output in outputs.items()}
    if tokens <= REFERENCE_TOKENS:
        expected = reference(torch, layer, experts, call)
        largest = float(expected.abs().max())
        for path, output in outputs.items():
            row[f"{path}_relative_difference"] = float((output.float() - expected).abs().max()) / largest
    else:
        first = outputs.get("wide")
        for path, output in outputs.items():
            if first is not None:
                difference = float((output.float() - first.float()).abs().max())
                row[f"{path}_difference_from_wide"] = difference / float(first.float().abs().max())
    operations = 2.0 * tokens * (layer.top_k + layer.shared) * layer.matrices
    row["times"] = {
        name: {
            "us": asdict(time),
            "percent_of_floor": 100 * floor / time.median,
            "tflops": 1e-6 * operations / time.median,
        }
        for name, time in machine.times(contenders.ready).items()
    }
    row["bits_changed"] = [path for path, output in outputs.items() if not torch.equal(output, once[path])]
    row["not_replayed"] = contenders.not_replayed
    row["left_out"] = left_out
    return row


def _peers(torch: Any, layer: Layer, call: Any, experts: Any) -> dict[str, Callable[[], Any] | str]:
    from qwenforge.bench.moe_peers import peers

    found: dict[str, Callable[[], Any] | str] = {}
    for name, peer in peers(torch, layer, call.hidden, call.logits, call.gates, experts.gate_up, experts.down).items():
        if not isinstance(peer, str):
            try:
                peer()
            except Exception as error:  # noqa: BLE001 - the reason goes into the report
                found[name] = f"{type(error).__name__}: {error}"[:300]
                continue
        found[name] = peer
    return found


def kernels_for(torch: Any, library: Path) -> Kernels:
    """The kernels on torch's current CUDA stream, with workspace from torch."""
    return Kernels(
        library,
        lambda size: torch.empty(size, dtype=torch.int8, device="cuda"),
        lambda: int(torch.cuda.current_stream().cuda_stream),
    )


def require_gpu(nvcc: str | Path | None = "") -> Any:
    """torch, where there is a GPU and, if ``nvcc`` is not None, a compiler or what it would make.

    Raises:
        SystemExit: with one sentence on stderr and code 1 where something is missing.
    """
    try:
        import torch
    except ModuleNotFoundError:
        missing: str | None = "torch is not installed"
    else:
        missing = None if torch.cuda.is_available() else "no NVIDIA GPU is visible"
    if missing is None and nvcc is None:
        missing = "nvcc is not on PATH: name it with --nvcc"
    if missing is not None:
        print(f"{Path(sys.argv[0]).name}: error: {missing}", file=sys.stderr)
        raise SystemExit(1)
    return torch


def add_compiler_options(parser: argparse.ArgumentParser) -> None:
    """--nvcc and --cutlass, which every script that builds the kernels takes."""
    parser.add_argument("--nvcc", default=shutil.which("nvcc"), help="the CUDA compiler (default: the one on PATH)")
    parser.add_argument(
        "--cutlass", type=Path, metavar="FOLDER", help="CUTLASS's headers, for the grouped path (compiles for minutes)"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; 1 where there is no GPU or no compiler."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="example: python -P bench/kernels.py moe --types bf16,int4-128 --tokens 1,8 --json times.json",
    )
    parser.add_argument("part", nargs="?", choices=["moe", "attention", "all"], default="all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, after every row")
    parser.add_argument("--types", type=_named(KINDS), default=KINDS, metavar="TYPE,...", help="in this order")
    parser.add_argument("--layers", type=_named(LAYERS), default=LAYERS, metavar="LAYER,...", help="in this order")
    parser.add_argument("--tokens", type=_numbers, default=TOKENS, metavar="N,...")
    parser.add_argument("--routing", type=_names(ROUTINGS), default=ROUTINGS, metavar="uniform,skewed")
    parser.add_argument("--heads", type=_named(HEADS), default=HEADS, metavar="MODEL,...", help="of attention")
    parser.add_argument("--caches", type=_named(CACHES), default=CACHES, metavar="CACHE,...", help="of attention")
    parser.add_argument("--works", type=_names(list(WORKS)), default=list(WORKS), metavar="decode,prefill")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), metavar="SECONDS", help="attention: leave out rows after so long"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--library", type=Path, metavar="FILE", help="the kernels, compiled before")
    add_compiler_options(parser)
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + args.limit
    torch = require_gpu(args.library or args.nvcc)
    with tempfile.TemporaryDirectory() as folder:
        if args.library is None:
            print("compiling", flush=True)
        library = args.library or build(args.nvcc, Path(folder), args.cutlass)
        kernels = kernels_for(torch, library)
        machine = Machine(torch, QUICK_ROUNDS if args.quick else ROUNDS)
        report: dict[str, Any] = {
            "gpu": machine.name,
            "sm": machine.sm,
            "torch": torch.__version__,
            "rounds": machine.rounds,
            "copy_bandwidth": machine.bandwidth,
            "bf16_rate": machine.rate,
        }
        if args.part != "attention":
            rows = moe_rows(machine, kernels, args.layers, args.types, args.tokens, args.routing)
            _collect(report, "moe", rows, args.json)
        if args.part != "moe":
            works = [work for name in args.works for work in WORKS[name]]
            found = attention_rows(machine, kernels, args.heads, args.caches, works, deadline=deadline)
            _collect(report, "attention", found, args.json)
            for line in [*paths_to_change(report["attention"]), *targets(report["attention"])]:
                print(line)
    return 0


def _collect(report: dict[str, Any], part: str, rows: Iterator[dict[str, Any]], target: Path | None) -> None:
    report[part] = []
    for row in rows:
        report[part].append(row)
        print(part, json.dumps(row), flush=True)
        if target is not None:
            partial = target.with_name(target.name + ".partial")
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, target)


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def _named(known: Sequence[_Named]) -> Callable[[str], list[_Named]]:
    by_name = {one.name: one for one in known}
    parse = _names(list(by_name))
    return lambda text: [by_name[name] for name in parse(text)]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
