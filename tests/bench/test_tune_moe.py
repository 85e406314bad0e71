"""The tuner's decisions, on made-up times."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qwenforge.bench import tune_moe
from qwenforge.bench.kernel_library import PLUGINS
from qwenforge.bench.tune_moe import Sample, Thresholds, best_thresholds, main, regret, samples_of, table_line


def _samples(*, grouped: bool = False) -> list[Sample]:
    """Eight is best up to 8 tokens, sixteen up to 12 pairs an expert, then wide, and grouped from 512 tokens on."""
    samples = []
    for tokens in (1, 4, 8, 16, 64, 128, 512, 2048):
        pairs = tokens / 8
        times = {
            "eight": 10.0 if tokens <= 8 else 40.0,
            "sixteen": 12.0 if tokens <= 8 else 20.0 if pairs <= 12 else 60.0,
            "wide": 30.0 if pairs <= 12 else 40.0,
        }
        if grouped:
            times["grouped"] = 50.0 if tokens < 512 else 25.0
        samples.append(Sample(tokens, pairs, times))
    return samples


def test_the_best_paths_are_found() -> None:
    assert best_thresholds(_samples()) == Thresholds(8, 8, 0)
    chosen = best_thresholds(_samples(grouped=True))
    assert chosen == Thresholds(8, 8, 512) and regret(chosen, _samples(grouped=True)) == 0


def test_a_path_that_is_not_always_there_is_chosen_only_where_it_is() -> None:
    samples = [*_samples(grouped=True), Sample(512, 64.0, {"wide": 40.0})]
    assert best_thresholds(samples).grouped_from == 512
    assert Thresholds(8, 8, 512).choose(samples[-1]) == "wide"


def test_between_shapes_that_disagree_the_largest_loss_decides() -> None:
    samples = [Sample(8, 1.0, {"eight": 10.0, "sixteen": 11.0}), Sample(8, 2.0, {"eight": 15.0, "sixteen": 10.0})]
    assert regret(Thresholds(8, 0, 0), samples) == pytest.approx(0.5)
    assert best_thresholds(samples) == Thresholds(0, 2, 0)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        best_thresholds([])


def test_committed_tables_have_a_line_for_every_kind_of_weights() -> None:
    files = sorted((PLUGINS / "moe" / "tactics").glob("sm*.inc"))
    assert {path.stem for path in files} == {f"sm{sm}" for sm in (80, 86, 87, 89, 90, 100, 110, 120)}
    included = re.findall(r'"moe/tactics/(sm\d+)\.inc"', (PLUGINS / "moe" / "tactics" / "tactics.h").read_text())
    assert included == sorted((path.stem for path in files), key=lambda name: int(name[2:]))
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == 4
        for line, kind in zip(lines, tune_moe.ENUMERATORS, strict=True):
            numbers = [int(number) for number in re.findall(r"\*/ (\d+)", line)]
            source = line.partition("// source: ")[2]
            assert numbers[0] == int(path.stem[2:]) and source
            assert line == table_line(numbers[0], kind, Thresholds(*numbers[1:]), source)


def test_rows_of_the_benchmark_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"eight": 10.0, "wide": 12.0, "torch grouped_mm": 1.0}
    row = {
        "layer": "Qwen3-30B-A3B",
        "weights": "int4-64",
        "tokens": 8,
        "times": {name: {"us": {"median": time}} for name, time in times.items()},
    }
    assert samples_of([row, {"layer": "x", "left_out": "y"}])["int4"] == [Sample(8, 0.5, {"eight": 10.0, "wide": 12.0})]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"gpu": "a GPU", "sm": 90, "moe": [row]}), encoding="utf-8")
    assert main(["--rows", str(file)]) == 0
    assert capsys.readouterr().out == (
        "{/*sm*/ 90, WeightType::kInt4, /*eightUpTo*/ 8, /*sixteenUpTo*/ 0, /*groupedFrom*/ 0}, "
        "// source: bench/tune_moe.py on a GPU, at most 0 % behind the best path\n"
    )
