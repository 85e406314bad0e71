"""``bench/gpu_models.py`` as far as it goes without a GPU: floors, peers, a run on the CPU, the table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwenforge.bench import gpu_model_runs, gpu_models
from qwenforge.bench.geometries import GEOMETRIES, STANDARD_DEVIATION, geometry_config, write_checkpoint
from qwenforge.bench.gpu_floors import decode_floor
from qwenforge.bench.gpu_model_runs import VARIANTS, Setting, Variant, rows
from qwenforge.bench.gpu_model_table import line, table, targets
from qwenforge.bench.gpu_subjects import TransformersOnGpu
from qwenforge.bundle import Bundle
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.config import ModelConfig
from support.source_tree import ROOT
from support.torch_stand_in import StandIn, machine

OURS, EAGER, COMPILED, NATIVE, MIXED = VARIANTS


def _setting(work: Path, **changes: Any) -> Setting:
    memory = iter(range(10**9, 10**12, 10**9))
    made = Setting(
        bandwidth=4e9,
        used_bytes=lambda: next(memory),
        work=work,
        batches=(1, 2),
        prompt_tokens=14,
        new_tokens=4,
        runs=2,
        target="ort-cpu",
        device="cpu",
    )
    return replace(made, **changes)


# 2 bytes a weight but for the embedding table, of which a token reads a row; the head is a matrix of its own.
@pytest.mark.parametrize(
    ("model", "batch", "weights"),
    [("7b", 1, 2 * (7_615_616_512 - 152064 * 3584)), ("0.5b", 1, 2 * 494_032_768)],
)
def test_decode_floor_is_reading_the_weights_once(model: str, batch: int, weights: int) -> None:
    config = ModelConfig.parse(GEOMETRIES[model], where=model)
    floor = decode_floor(config, batch=batch, prompt_tokens=512, new_tokens=64, bandwidth=4.3e12)
    assert floor.weights_ms == pytest.approx(1e3 * weights / 4.3e12, rel=1e-4)
    heads = config.num_key_value_heads * config.head_dim
    caches = 2 * config.num_hidden_layers * heads * 2 * (512 + 32)
    assert floor.ms - floor.weights_ms == pytest.approx(1e3 * caches / 4.3e12)


def test_decode_floor_reads_the_experts_that_tokens_go_to() -> None:
    config = ModelConfig.parse(GEOMETRIES["moe-a2.7b"], where="moe")
    one, many = (
        decode_floor(config, batch=batch, prompt_tokens=8, new_tokens=2, bandwidth=4e12).weights_ms for batch in (1, 32)
    )
    expert = 3 * 2048 * 1408 * 24 * 2 / 4e12 * 1e3
    expected = 60 * (1 - (1 - 4 / 60) ** 32) - 4
    assert many - one == pytest.approx(expected * expert, rel=1e-3)


@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_compiled_peer_with_a_static_cache_gives_the_tokens_of_the_eager_one(model: str, tmp_path: Path) -> None:
    # So that layers say more than the tied embedding, by which a token is its own successor.
    settings = geometry_config(model, "bf16") | {"initializer_range": 0.3}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    found = []
    for compiled in (None, "eager"):
        torch.manual_seed(0)
        peer = TransformersOnGpu(tmp_path, 20, compiled, "cpu", threads=2)
        prompts = np.random.default_rng(1).integers(0, peer.vocab_size, (2, 9)).tolist()
        peer.steps(prompts[::-1], 3)  # leaves something in the static cache
        tokens, times = peer.generate(prompts, 6)
        assert len(times) == 7 and times == sorted(times)
        found.append(tokens)
    assert found[0] == found[1] and np.shape(found[0]) == (6, 2) and len(np.unique(found[0])) > 2


def test_rows_of_ours_and_a_peer_on_the_cpu(tmp_path: Path) -> None:
    """Export, processes, arithmetic and cleaning up, with ort-cpu in the place of ort-cuda."""
    found = list(rows(_setting(tmp_path), ["tiny"], [OURS, EAGER]))
    assert [row.get("left_out") for row in found] == [None] * 4
    assert [(row["subject"], row["batch"]) for row in found] == [
        (name, batch) for name in ("qwenforge", "transformers eager") for batch in (1, 2)
    ]
    for row in found:
        assert row["model"] == "tiny" and row["layers"] == 2
        assert row["itl_ms"]["p50"] > 0 and 0 < row["ttft_ms"]["low"] <= row["ttft_ms"]["high"]
        assert row["gpu_bytes"] == row["batch"] * 10**9
        assert row["floor_ms"] > row["weights_floor_ms"] > 0
        assert row["itl_over_floor"] == pytest.approx(row["itl_ms"]["p50"] / row["floor_ms"])
    assert found[0]["description"] == "qwenforge" and found[0]["export_seconds"] > 0
    assert list(tmp_path.iterdir()) == [], "checkpoints and bundles of gigabytes are not left behind"


def test_export_for_the_gpu_is_made_of_the_operators_asked_for(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "tiny-moe", dtype="bf16")
    setting = _setting(tmp_path, target="ort-cuda")
    gpu_model_runs._export(setting, ("native", "plugin"), checkpoint, tmp_path / "bundle", 16)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.ort_cuda is not None and manifest.limits.max_batch == 2
    assert (manifest.ort_cuda.attention, manifest.ort_cuda.moe) == ("native", "plugin")


def test_what_cannot_run_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(setting: Setting, head: dict[str, Any], geometry: str, variant: Variant, *rest: Any) -> Any:
        seen.append((geometry, variant))
        if variant is EAGER:
            raise RuntimeError("transformers-gpu ended with exit code 1; its error is above")
        yield head | {"batch": 1}

    with monkeypatch.context() as patched:
        patched.setattr(gpu_model_runs, "_variant_rows", measured)
        found = list(rows(_setting(tmp_path), ["tiny", "tiny-moe"], VARIANTS))
    assert seen == [("tiny", v) for v in (OURS, EAGER, COMPILED, NATIVE)] + [("tiny-moe", v) for v in VARIANTS]
    assert found[1]["left_out"].startswith("transformers-gpu ended") and found[2]["batch"] == 1
    (row,) = rows(_setting(tmp_path, why_not_ours="needs onnxruntime-gpu"), ["tiny"], [OURS])
    assert row["left_out"] == "needs onnxruntime-gpu" and line(row) == "tiny qwenforge: needs onnxruntime-gpu"
    (row,) = rows(_setting(tmp_path, deadline=0.0), ["tiny"], [EAGER])
    assert row["left_out"] == "the time for this part was over"


def _row(subject: str, step: float, *, model: str = "7b", batch: int = 1) -> dict[str, Any]:
    return {
        "model": model,
        "subject": subject,
        "batch": batch,
        "ttft_ms": {"median": 10 * step},
        "itl_ms": {"p50": step},
        "tokens_per_second": {"median": 1e3 / step},
        "gpu_bytes": 16e9,
        "itl_over_weights_floor": step / 3.5,
    }


@pytest.mark.parametrize(
    ("step", "verdict"), [(4.2, "1.20x of reading the weights, the target of 1.25x is met"), (7.0, "missed")]
)
def test_table_says_what_was_reached(step: float, verdict: str) -> None:
    found = [_row("qwenforge", step), _row("transformers eager", 21.0), _row("ONNX Runtime's own operators", 8.4)]
    text = table(found)
    assert text[1] == (
        "7b transformers eager B=1: TTFT 210.0 ms, ITL 21.00 ms (6.00x of reading the weights), 48 tokens/s, 16.0 GB"
    )
    assert verdict in text[3] and len(text) == 5
    faster = f"{8.4 / step:.2f}x"
    assert f"TTFT {faster} faster than ONNX" in text[4] and f"ITL {faster} than ONNX" in text[4]
    assert targets(found[1:]) == [] and targets([{**found[0], "left_out": "no"}]) == []


def test_numbers_of_the_gpu_are_spread_as_those_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "DRAWN", 1000)
    write_checkpoint(tmp_path, "tiny", dtype="bf16", layers=1, draw=gpu_models.drawn(StandIn()))
    source = Checkpoint.open(tmp_path)
    assert source.config.num_hidden_layers == 1 and geometry_config("tiny", "bf16", 1)["num_hidden_layers"] == 1
    embedding = source.tensor("model.embed_tokens.weight").numpy().astype(np.float32)
    assert float(embedding.std()) == pytest.approx(STANDARD_DEVIATION, rel=0.02)
    assert len(np.unique(embedding[:, 0])) > 100
    norm = source.tensor("model.norm.weight").numpy().astype(np.float32)
    assert float(np.abs(norm - 1).max()) < 6 * STANDARD_DEVIATION


def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-P", ROOT / "bench" / "gpu_models.py"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": ""})
    assert finished.returncode == 1 and finished.stdout == ""
    assert finished.stderr == "gpu_models.py: error: no NVIDIA GPU is visible\n"


def test_modules_that_are_missing_are_all_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacks = ("pydantic", "onnxruntime")
    monkeypatch.setattr(gpu_models.importlib.util, "find_spec", lambda name: None if name in lacks else object())
    assert gpu_models.main([]) == 1
    assert capsys.readouterr().err == (
        "gpu_models.py: error: this Python lacks the modules onnxruntime, pydantic: install them\n"
    )


def test_program_writes_rows_as_they_come_and_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "models.json"
    asked: list[Setting] = []

    def measured(setting: Setting, models: Sequence[str], variants: Sequence[Variant]) -> Any:
        asked.append(setting)
        yield _row("qwenforge", 4.0)
        assert len(json.loads(target.read_text(encoding="utf-8"))["models"]) == 1
        yield {"model": models[0], "subject": variants[1].name, "left_out": "out of memory"}

    stand_in = StandIn()
    monkeypatch.setattr("qwenforge.bench.kernels.require_gpu", lambda: stand_in)
    monkeypatch.setattr("qwenforge.bench.gpu_clock.Machine", lambda *_: machine(stand_in))
    monkeypatch.setattr(gpu_model_runs, "rows", measured)
    assert gpu_models.main(["--models", "tiny", "--json", str(target), "--work", str(tmp_path), "--layers", "2"]) == 0
    report = json.loads(target.read_text(encoding="utf-8"))
    assert report["gpu"] == "stand-in" and report["copy_bandwidth"] == 4e12 and len(report["models"]) == 2
    assert "needs onnxruntime-gpu" in report["ours_left_out"] == asked[0].why_not_ours
    assert asked[0].layers == 2 and asked[0].bandwidth == 4e12
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "tiny transformers eager: out of memory" and "target of 1.25x is met" in lines[-1]
    assert list(tmp_path.iterdir()) == [target]


def test_without_onnxruntime_gpu_ours_have_a_reason() -> None:
    assert "needs onnxruntime-gpu" in (gpu_models.why_not_ours() or "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--models", "7b,70b"], "'70b' is not one of 0.5b"), (["--batches", "1,0"], "0 is less than 1")],
)
def test_wrong_option_is_named(arguments: Sequence[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_models.main(arguments)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_unknown_failure_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(gpu_model_runs, "_variant_rows", broken)
    with pytest.raises(KeyError):
        list(rows(_setting(tmp_path), ["tiny"], [OURS]))
