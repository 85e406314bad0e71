"""``bench/kernels.py attention`` from heads to report without a GPU: emulated kernels, a stand-in for torch's CUDA."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenforge.bench import attention_report, attention_rows, kernels
from qwenforge.bench.attention_layers import (
    CACHES,
    HEADS,
    PREFILL_WORKS,
    AttentionCall,
    Cache,
    Heads,
    Work,
    bytes_needed,
    decode_works,
    floor_of,
    make_call,
)
from qwenforge.bench.attention_reference import Differences, checked_rows, differences
from support import emulated_kernels, simt
from support.torch_stand_in import StandIn, machine

WHY = simt.why_missing() or ("without a GPU" if simt.ON_GPU else "")
emulated = pytest.mark.skipif(bool(WHY), reason=WHY or "-")

SMALL = Heads("small", 6, 2, 64)
PAGED = replace(CACHES[3], page_size=16)
WORKS = [Work(2, 1, 70), Work(1, 5, 0), Work(1, 4, 30)]


def _rows(caches: list[Cache], works: list[Work], **options: Any) -> list[dict[str, Any]]:
    torch.manual_seed(3)
    stand_in = machine(StandIn(free=options.pop("free", 1 << 30)))
    library = emulated_kernels.kernels()
    return list(attention_rows.attention_rows(stand_in, library, [SMALL], caches, works, **options))


@emulated
@pytest.mark.parametrize("cache", [*CACHES[:3], PAGED], ids=lambda cache: cache.name)
def test_rows_have_every_path_and_peer_or_the_reason(cache: Cache) -> None:
    for row, work in zip(_rows([cache], WORKS), WORKS, strict=True):
        assert {"plain", "split", "tiled"} <= row["times"].keys() and row["auto"] == "split"
        assert row["best"] == "plain", "of equal times the first"
        assert sum(name.endswith(("output_difference", "append_difference")) for name in row) >= 6
        assert attention_report.wrong(row) == [] and row["bits_changed"] == []
        split = row["times"]["split"]
        assert split["percent_of_floor"] == pytest.approx(row["floor_us"] / 10)
        assert max(split["percent_of_bandwidth"], split["percent_of_rate"]) == pytest.approx(split["percent_of_floor"])
        if cache.name == "bf16":
            assert "torch flash" in row["times"] and ("torch flash folded" in row["times"]) == (work.new == 1)
            assert row["torch flash_output_difference"] < 0.02
            assert "torch cudnn" in row["left_out"], "the CPU has none"
        else:
            assert "neither pages nor caches of 8 bits" in row["left_out"]["torch flash"]
        words = attention_report.line(row)
        assert words.startswith(f"small {cache.name} {work.kind} B={work.batch}") and "1000.0 us" in words


@emulated
def test_what_is_not_timed_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_rows, "PLAIN_PAIRS", 100)
    monkeypatch.setattr(attention_rows, "TILED_KEYS", 100)
    (row,) = _rows(CACHES[:1], WORKS[:1])
    assert row["left_out"]["plain"] == "not timed beyond 100 pairs of a query and a key"
    assert row["left_out"]["tiled"] == "not timed with one query a row beyond 100 keys" and row["best"] == "split"


@emulated
def test_rows_that_do_not_fit_or_come_too_late_are_named() -> None:
    (row,) = _rows(CACHES[:1], WORKS[:1], free=1000)
    assert row["left_out"] == "needs 0.0 GB, 0.0 GB are free" and "times" not in row
    (row,) = _rows(CACHES[:1], WORKS[:1], deadline=0.0)
    assert attention_report.line(row) == "small bf16 decode B=2 keys=71: the time for this part was over"


@emulated
def test_program_writes_the_rows_and_says_what_follows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn()
    monkeypatch.setattr(kernels, "require_gpu", lambda _: stand_in)
    monkeypatch.setattr(kernels, "kernels_for", lambda *_: emulated_kernels.kernels())
    monkeypatch.setattr(kernels, "Machine", lambda *_: machine(stand_in))
    monkeypatch.setattr(kernels, "HEADS", (SMALL,))
    monkeypatch.setattr(kernels, "WORKS", {"decode": WORKS[:1], "prefill": WORKS[1:2]})
    target = tmp_path / "times.json"
    options = ["--library", "made.so", "--caches", "bf16,int8", "--works", "decode", "--json", str(target)]
    assert kernels.main(["attention", *options]) == 0
    report = json.loads(target.read_text(encoding="utf-8"))
    assert [(row["cache"], row["kind"]) for row in report["attention"]] == [("bf16", "decode"), ("int8", "decode")]
    assert report["copy_bandwidth"] == 4e12 and "moe" not in report
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 1 rows with peers are faster than every peer"
    assert kernels.main(["attention", *options, "--limit", "-1"]) == 0
    late = json.loads(target.read_text(encoding="utf-8"))["attention"]
    assert {row["left_out"] for row in late} == {"the time for this part was over"}


# An H200's 4.3 TB/s and 790 TFLOP/s; KERNELS.md's floors of reading the cache, one layer, 16 bits.
@pytest.mark.parametrize(("batch", "keys", "expected"), [(1, 4096, 1.95), (1, 32768, 15.6), (32, 4096, 62.4)])
def test_decode_floor_is_that_of_reading_the_cache(batch: int, keys: int, expected: float) -> None:
    floor = floor_of(HEADS[0], CACHES[0], Work(batch, 1, keys - 1), 4.3e12, 790e12)
    assert floor.us == floor.memory_us == pytest.approx(expected, rel=0.02)
    half = floor_of(HEADS[0], CACHES[2], Work(batch, 1, keys - 1), 4.3e12, 790e12)
    assert half.cache_bytes == floor.cache_bytes / 2


def test_prefill_floor_counts_the_pairs_that_see_each_other() -> None:
    floor = floor_of(HEADS[0], CACHES[0], Work(1, 8192, 0), 4e12, 8e14)
    assert floor.operations == 4 * 28 * 128 * 8192 * 8193 // 2 and floor.us == floor.arithmetic_us
    continued = Work(1, 2048, 4096)
    assert continued.pairs == sum(4096 + place + 1 for place in range(2048))


def test_grid_is_the_one_asked_for() -> None:
    found = {(work.batch, work.length) for work in decode_works()}
    assert found == {(batch, keys) for batch in (1, 8, 32, 128) for keys in (1024, 4096, 32768)}
    assert [work.new for work in PREFILL_WORKS] == [512, 2048, 8192, 2048]
    # 128 rows of 32768 keys, 4 heads of 128, both caches in bf16: 8.6 GB, and something for checking them.
    assert 8.6e9 < bytes_needed(HEADS[0], CACHES[0], Work(128, 1, 32767)) < 12e9


def _attended(call: AttentionCall) -> torch.Tensor:
    """Attention of SMALL in float64 by torch, heads repeated and an explicit mask; it appends as the kernels do."""
    batch, new, _ = call.query.shape
    places = call.positions.long()

    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        x = x.double().view(batch, new, count, 64)
        angle = [table.double()[places][:, :, None] for table in (call.layer.cos, call.layer.sin)]
        swapped = torch.cat([-x[..., 32:], x[..., :32]], -1)
        return x * angle[0].repeat(1, 1, 1, 2) + swapped * angle[1].repeat(1, 1, 1, 2)

    query = heads(call.query, 6).to(torch.bfloat16).double().transpose(1, 2)
    first, past = int(call.starts[0]), call.layer
    past.keys[:, :, first : first + new] = heads(call.key, 2).transpose(1, 2)
    past.values[:, :, first : first + new] = call.value.view(batch, new, 2, 64).transpose(1, 2)
    keys, values = (cache.double().repeat_interleave(3, 1) for cache in (past.keys, past.values))
    mask = torch.arange(past.keys.shape[2]) <= places[0][:, None]
    found = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=past.scale)
    return found.transpose(1, 2).reshape(call.query.shape)


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_reference_is_attention(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own in float64; several pieces of queries; what is planted is found."""
    monkeypatch.setattr("qwenforge.bench.attention_reference.REFERENCE_QUERIES", 2)
    torch.manual_seed(5)
    stand_in = StandIn()
    call = make_call(stand_in, SMALL, CACHES[0], work)
    output = _attended(call)

    def found() -> Differences:
        return differences(stand_in, SMALL, work, call, output)

    assert found().output < 1e-5 and found().append < 4e-3
    output[-1, -1, 70] += 0.2 * output.abs().max()
    assert found().output > 0.1
    output[0, 0, 0] = float("nan")
    assert found().output != found().output
    call.layer.values[-1, 1, work.past, 3] += 1
    assert found().append > 0.1
    call.layer.keys[0, 0, work.past, 0] = float("nan")
    assert found().append != found().append


def test_rows_compared_are_first_and_last_and_some_between() -> None:
    assert checked_rows(1) == [0] and checked_rows(3) == [0, 1, 2] and checked_rows(8) == list(range(8))
    found = checked_rows(128)
    assert len(set(found)) == 8 and found[0] == 0 and found[-1] == 127


def test_nan_in_a_row_that_is_not_compared_is_found() -> None:
    stand_in, work = StandIn(), Work(32, 1, 3)
    call = make_call(stand_in, SMALL, CACHES[0], work)
    output = _attended(call)
    assert 1 not in checked_rows(32) and differences(stand_in, SMALL, work, call, output).output < 1e-5
    output[1, 0, 0] = float("nan")
    assert not differences(stand_in, SMALL, work, call, output).output <= 1.0


def _report_row(**changes: Any) -> dict[str, Any]:
    times = {"split": 100.0, "tiled": 80.0, "torch flash": 120.0}
    return {
        "heads": "H",
        "cache": "bf16",
        "kind": "decode",
        "batch": 8,
        "new": 1,
        "keys": 32768,
        "cache_bytes": 5e8,
        "bound": "memory",
        "auto": "split",
        "best": "tiled",
        "split_output_difference": 0.01,
        "bits_changed": [],
        "left_out": {},
        "times": {
            name: {"us": {"median": us}, "percent_of_bandwidth": 8700 / us, "percent_of_rate": 1.0}
            for name, us in times.items()
        },
        **changes,
    }


def test_report_says_which_path_should_be_taken_and_what_was_reached() -> None:
    row = _report_row()
    assert (
        attention_report.line(row)
        == "H bf16 decode B=8 keys=32768: split 100.0 us, 87 % of bandwidth; 1.20x torch flash"
    )
    assert attention_report.paths_to_change([row, _report_row(auto="tiled")]) == [
        "H bf16 decode B=8 keys=32768: tiled, 1.25x faster than the library's split"
    ]
    assert attention_report.paths_to_change([_report_row(auto="plain")]) == [
        "H bf16 decode B=8 keys=32768: tiled; the library's plain was not timed"
    ]
    slow = _report_row()
    slow["times"]["split"] = {"us": {"median": 130.0}, "percent_of_bandwidth": 67.0, "percent_of_rate": 1.0}
    assert attention_report.targets([row, slow, _report_row(cache_bytes=1e8)]) == [
        "1 of 2 decode rows with more than 256 MB of cache reach 85 % of the copy bandwidth; the least is 67 %",
        "2 of 3 rows with peers are faster than every peer",
    ]
    assert attention_report.targets([]) == [] and attention_report.paths_to_change([]) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"split_output_difference": 0.2}, "WRONG: split_output_difference 0.2"),
        ({"torch flash_output_difference": float("nan")}, "WRONG: torch flash_output_difference nan"),
        ({"tiled_append_difference": 0.02}, "WRONG: tiled_append_difference 0.02"),
        ({"bits_changed": ["split"]}, "WRONG: replays of split gave other bits"),
    ],
)
def test_report_says_what_is_wrong(change: dict[str, Any], sentence: str) -> None:
    assert sentence in attention_report.line(_report_row(**change))
