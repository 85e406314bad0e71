"""``qwenforge bench``: its figures on an exported bundle, alone and against transformers, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwenforge.bench import latency
from qwenforge.bench.latency import Measurement, Spread, Workload
from qwenforge.cli.bench import as_json, print_table
from qwenforge.cli.main import main
from support.bundle_builder import edit_manifest
from support.checkpoints import make_checkpoint
from support.command_line import interrupted_on_terminal, qwenforge

SMALL = ["--prompt-tokens", "16", "--new-tokens", "6", "--runs", "2", "--threads", "2"]
COLUMNS = ("TTFT ms", "ITL ms p50 / p90 / p99", "tokens/s", "peak RSS MB")


def test_bench_against_transformers_prints_and_writes_figures_and_ratios(
    bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    file.write_text("an older report")
    options = ["--against", "transformers", "--checkpoint", checkpoint, "--json", file]
    finished = qwenforge("bench", bundle, *SMALL, *options)
    assert (finished.code, finished.err) == (0, "")
    for column in COLUMNS:
        assert column in finished.out
    assert "16 prompt + 6 new tokens, batch 1, 2 runs, 2 threads: median [min-max]" in finished.out
    report = json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert report["workload"] == {"prompt_tokens": 16, "new_tokens": 6, "batch": 1, "runs": 2, "threads": 2}
    ours, theirs = report["subjects"]
    assert (ours["description"], theirs["description"]) == ("qwenforge", "transformers fp32")
    for subject in (ours, theirs):
        assert [len(steps) for steps in subject["steps_ms"]] == [5, 5]
        assert 0 < subject["itl_ms"]["p50"] <= subject["itl_ms"]["p90"] <= subject["itl_ms"]["p99"]
        assert 0 < subject["ttft_ms"]["low"] <= subject["ttft_ms"]["median"] <= subject["ttft_ms"]["high"]
        (row,) = (line for line in finished.out.splitlines() if f"│ {subject['description']} " in line)
        assert f"{subject['ttft_ms']['median']:.1f} [" in row and f"{subject['peak_rss_bytes'] / 1e6:.0f}" in row
        assert f"{subject['tokens_per_second']['median']:.1f} [" in row and f"{subject['itl_ms']['p90']:.2f}" in row
    assert set(ours["ratio_to_first"].values()) == {1.0}
    assert theirs["ratio_to_first"]["ttft"] == theirs["ttft_ms"]["median"] / ours["ttft_ms"]["median"]
    assert theirs["ratio_to_first"]["peak_rss"] > 1, "torch alone takes more than all of ours"


def test_json_to_stdout_is_one_object_and_nothing_else(bundle: Path) -> None:
    finished = qwenforge("bench", bundle, *SMALL, "--batch", "3", "--json", "-")
    assert (finished.code, finished.err) == (0, "")
    report = json.loads(finished.out)
    (subject,) = report["subjects"]
    assert report["workload"]["batch"] == 3
    rates = [3 * len(steps) / sum(steps) * 1e3 for steps in subject["steps_ms"]]
    found = subject["tokens_per_second"]
    assert sorted(rates) == pytest.approx([found["low"], found["high"]])


def measurement(description: str, ttft: float, step: float, rate: float, peak: int) -> Measurement:
    """Figures that are the same in every run."""
    itl = {"p50": step, "p90": 2 * step, "p99": 3 * step}
    return Measurement(description, Spread(ttft, ttft, ttft), itl, Spread(rate, rate, rate), peak)


def test_ratios_are_each_subject_s_figure_over_the_first_one_s(capsys: pytest.CaptureFixture[str]) -> None:
    results = [measurement("ours", 10.0, 2.0, 500.0, 100_000_000), measurement("theirs", 25.0, 3.0, 250.0, 400_000_000)]
    report = as_json(results, Workload())
    assert report["subjects"][1]["ratio_to_first"] == {
        "ttft": 2.5,
        "itl_p50": 1.5,
        "tokens_per_second": 0.5,
        "peak_rss": 4.0,
    }
    print_table(results, Workload())
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "theirs" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["theirs", "25.0 [25.0-25.0]", "3.00 / 6.00 / 9.00", "250.0 [250.0-250.0]", "400", "2.50, 0.50"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence of ``qwenforge bench ARGUMENTS``."""
    assert main(["bench", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("qwenforge: error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["--prompt-tokens", "250", "--new-tokens", "7"], "257 tokens (prompt and answer) exceed the bundle's limit"),
        (["--against", "vllm"], "no peer is called 'vllm'; known peers: transformers"),
        (["--against", "transformers"], "--against transformers needs --checkpoint DIR"),
        (["--against", "transformers", "--checkpoint", "absent"], "absent does not exist: give the path"),
        (["--against", "transformers", "--checkpoint", "empty"], "empty is empty: download the checkpoint"),
        (["--against", "transformers", "--checkpoint", "other"], "was not exported from other"),
        (["--json", "nowhere/figures.json"], "the folder nowhere does not exist: create it first"),
        (["--json", "empty"], "empty is a folder: name the JSON file to write"),
    ],
)
def test_impossible_wish_is_refused_before_anything_is_measured(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "measure", None)
    Path("empty").mkdir()
    if "other" in arguments:
        make_checkpoint("other", "qwen2", intermediate_size=64)
    assert message in refusal(capsys, bundle, *arguments)


def test_folder_that_is_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path} is not a qwenforge bundle" in refusal(capsys, tmp_path)


def test_what_a_measured_process_refuses_is_one_sentence(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    narrow = shutil.copytree(bundle, tmp_path / "narrow")

    def allow_one(fields: dict[str, Any]) -> None:
        fields["limits"]["max_batch"] = 1

    edit_manifest(narrow, allow_one)
    assert "max_batch is 2, above the bundle's limit of 1" in refusal(capfd, narrow, *SMALL, "--batch", "2")


@pytest.mark.parametrize("arguments", [[], ["b", "--runs", "0"], ["b", "--batch", "x"], ["b", "--js", "f"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["bench", *arguments])
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: qwenforge ")


def test_progress_is_drawn_on_stderr_and_an_interrupt_is_one_line(bundle: Path) -> None:
    """The keyboard interrupts the measured processes too: they must not add their tracebacks."""
    options = ["--prompt-tokens", "16", "--new-tokens", "6", "--runs", "2000"]
    finished = interrupted_on_terminal(["bench", bundle, *options], when="qwenforge: run ")
    assert (finished.code, finished.out) == (130, "")
    assert "loading qwenforge" in finished.err and "Traceback" not in finished.err
    assert finished.err.endswith("qwenforge: interrupted\r\n")
