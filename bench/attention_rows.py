"""Rows of times of the attention kernels, as ``bench/kernels.py attention`` reports them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from qwenforge.bench.attention_layers import (
    AttentionCall,
    Cache,
    Floor,
    Heads,
    Work,
    bytes_needed,
    floor_of,
    make_call,
)
from qwenforge.bench.attention_peers import peers
from qwenforge.bench.attention_reference import differences
from qwenforge.bench.gpu_clock import Contenders, Machine
from qwenforge.bench.kernel_library import ATTENTION_PATHS, Kernels

PATHS = tuple(path for path in ATTENTION_PATHS if path != "auto")
PLAIN_PAIRS = 1 << 20
"""Queries times keys of a head beyond which the path without matrix instructions is not timed: seconds of it."""
TILED_KEYS = 1 << 17
"""Keys of all rows beyond which whole tiles of 128 queries are not timed with one query a row."""


def attention_rows(
    machine: Machine,
    kernels: Kernels,
    heads: Sequence[Heads],
    caches: Sequence[Cache],
    works: Sequence[Work],
    *,
    deadline: float = float("inf"),
) -> Iterator[dict[str, Any]]:
    """One row a cache, model's heads and amount of work; the caches of all models in turn.

    A row has the ``times`` of every path and peer that could run, each with its part of the copy bandwidth and of the
    bf16 matrix rate, and in ``left_out`` why the others could not; ``auto``, the path that the library takes, and
    ``best``, the one it should take; how far each is from fp32; in ``bits_changed`` the paths, of which there should be
    none, whose replays gave other bits than the first call. Rows after ``deadline`` (of ``time.monotonic``) are left
    out.
    """
    machine.torch.cuda.empty_cache()
    for cache in caches:
        for model in heads:
            for work in works:
                row: dict[str, Any] = {
                    "heads": model.name,
                    "cache": cache.name,
                    "kind": work.kind,
                    "batch": work.batch,
                    "new": work.new,
                    "keys": work.length,
                }
                why = _why_not(machine, model, cache, work, deadline)
                if why is not None:
                    yield row | {"left_out": why}
                    continue
                yield row | _measured(machine, kernels, model, cache, work)
                machine.torch.cuda.empty_cache()


def _why_not(machine: Machine, heads: Heads, cache: Cache, work: Work, deadline: float) -> str | None:
    if cache.cache_type == "fp8" and machine.sm < 89:
        return f"FP8 needs SM 89, this is {machine.sm}"
    if time.monotonic() > deadline:
        return "the time for this part was over"
    free, needed = machine.free_bytes(), bytes_needed(heads, cache, work)
    return f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if needed > free else None


def _measured(machine: Machine, kernels: Kernels, heads: Heads, cache: Cache, work: Work) -> dict[str, Any]:
    torch = machine.torch
    call = make_call(torch, heads, cache, work)
    floor = floor_of(heads, cache, work, machine.bandwidth, machine.rate)
    contenders = Contenders()
    calls: dict[str, Callable[[], Any]] = {}
    outputs: dict[str, Any] = {}
    found: dict[str, float] = {}
    for path in PATHS:
        why = _senseless(path, work)
        output = torch.full_like(call.query, float("nan"))
        try:
            if why is not None:
                raise ValueError(why)
            ours = _prepared(kernels, call, output, path)
            ours()
        except Exception as error:  # noqa: BLE001 - the reason goes into the report
            contenders.left_out[path] = str(error)[:300]
            continue
        calls[path], outputs[path] = ours, output
        off = differences(torch, heads, work, call, output)
        found[f"{path}_output_difference"], found[f"{path}_append_difference"] = off.output, off.append
    if outputs:  # which appended: the peers see what ours see
        for name, peer in peers(torch, heads, cache, work, call).items():
            if isinstance(peer, str):
                contenders.left_out[name] = peer
                continue
            try:
                answer = peer().transpose(1, 2).reshape(call.query.shape)
            except Exception as error:  # noqa: BLE001 - the reason goes into the report
                contenders.left_out[name] = f"{type(error).__name__}: {error}"[:300]
                continue
            calls[name] = peer
            found[f"{name}_output_difference"] = differences(torch, heads, work, call, answer).output
    torch.cuda.synchronize()
    contenders.capture(machine, calls, outputs)
    once = {path: output.clone() for path, output in outputs.items()}
    times: dict[str, Any] = {
        name: {
            "us": asdict(taken),
            "percent_of_floor": 100 * floor.us / taken.median,
            "percent_of_bandwidth": 100 * floor.memory_us / taken.median,
            "percent_of_rate": 100 * floor.arithmetic_us / taken.median,
        }
        for name, taken in machine.times(contenders.ready).items()
    }
    ours_timed = [path for path in PATHS if path in times]
    return {
        **_floor_fields(floor),
        "auto": kernels.attention_path(
            call.query, call.key, call.value, call.positions, call.starts, call.layer, torch.empty_like(call.query)
        ),
        "best": min(ours_timed, key=lambda path: times[path]["us"]["median"], default=None),
        **found,
        "times": times,
        "bits_changed": [path for path, output in outputs.items() if not torch.equal(output, once[path])],
        "not_replayed": contenders.not_replayed,
        "left_out": contenders.left_out,
    }


def _prepared(kernels: Kernels, call: AttentionCall, output: Any, path: str) -> Callable[[], None]:
    return kernels.prepared_attention(
        call.query, call.key, call.value, call.positions, call.starts, call.layer, output, path
    )


def _floor_fields(floor: Floor) -> dict[str, Any]:
    return {
        "cache_bytes": floor.cache_bytes,
        "floor_us": floor.us,
        "bound": "memory" if floor.memory_us >= floor.arithmetic_us else "arithmetic",
    }


def _senseless(path: str, work: Work) -> str | None:
    if path == "plain" and work.batch * work.new * work.length > PLAIN_PAIRS:
        return f"not timed beyond {PLAIN_PAIRS} pairs of a query and a key"
    if path == "tiled" and work.kind == "decode" and work.batch * work.length > TILED_KEYS:
        return f"not timed with one query a row beyond {TILED_KEYS} keys"
    return None
