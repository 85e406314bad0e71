"""``qwenforge export --quantize``: its arguments, its streams, and trouble that must be told and not absorbed."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenforge.bundle import Bundle
from qwenforge.cli.main import main
from qwenforge.engine import export as export_module
from qwenforge.errors import UserError
from qwenforge.exporter.trace import trace
from support.checkpoints import write_tokenizer
from support.source_tree import ROOT

CHECKPOINTS = ROOT / "examples/checkpoints"
FEW_ROWS = ("--calibration-rows", "4", "--no-verify")
_TRACED: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def each_kind_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights have no part in a trace, so that damaged copies of a checkpoint share it."""

    def traced_before(checkpoint: Any, dtype: Any) -> Any:
        key = f"{checkpoint.config.model_type} {dtype}"
        if key not in _TRACED:
            _TRACED[key] = trace(checkpoint, dtype)
        return _TRACED[key]

    monkeypatch.setattr(export_module, "trace", traced_before)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A copy of the trained dense checkpoint, to be damaged."""
    return Path(shutil.copytree(CHECKPOINTS / "tiny-qwen2", tmp_path / "tiny-qwen2"))


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A copy of the trained checkpoint with experts, to be damaged."""
    return Path(shutil.copytree(CHECKPOINTS / "tiny-qwen2-moe", tmp_path / "tiny-qwen2-moe"))


def change_weight(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change one tensor of a checkpoint, in place, as fp32."""
    import torch
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            wide = tensors[name].float()
            change(wide)
            tensors[name] = wide.to(torch.bfloat16)
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(f"there is no {name}")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence with which ``qwenforge export ARGUMENTS`` refuses."""
    assert main(["export", *map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qwenforge: error: ") and err.count("\n") == 1
    return err.removeprefix("qwenforge: error: ")


@pytest.mark.parametrize(
    ("name", "recipe"), [("tiny-qwen2", "int4-weight-only"), ("tiny-qwen2-moe", "int8-weight-only")]
)
def test_quantized_bundle_is_written_and_generates_text(
    name: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    assert main(["export", str(CHECKPOINTS / name), "-o", str(bundle), "--quantize", recipe, "--json", *FEW_ROWS]) == 0
    said = json.loads(capsys.readouterr().out)
    quantization = said["quantization"]
    assert quantization["recipe"]["name"] == recipe and quantization["missed"] == []
    assert quantization["accuracy"]["mean_kl"] <= quantization["budget"]["kl"]
    assert quantization["accuracy"]["top1_agreement"] >= quantization["budget"]["top1"]
    assert quantization["bytes"]["quantized"] == said["data_bytes"] < 0.6 * quantization["bytes"]["unquantized"]
    assert said["ort_cpu"]["kernels"] in ("qwenforge", "onnxruntime") and said["ort_cpu"]["basis"]
    assert sum(quantization["accuracy"]["kl_histogram"]["counts"]) == quantization["accuracy"]["positions"]
    record = Bundle.open(bundle, verify="full").manifest.quantization
    assert record is not None and record.recipe == recipe
    assert main(["run", str(bundle), "--prompt", "Return a copy of the", "--max-new-tokens", "8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"][0]) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_missed_budget_is_one_sentence_and_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    message = refusal(
        capsys,
        CHECKPOINTS / "tiny-qwen2",
        "-o",
        bundle,
        "--quantize",
        "int8-weight-only",
        "--budget",
        "kl=1e-9",
        *FEW_ROWS,
    )
    assert "misses its budget" in message and "(at most 1e-09)" in message
    assert message.count("SQNR") == 3 and "model.layers.0" in message
    assert not bundle.exists() and (tmp_path / "bundle.accuracy.html").is_file()


def test_search_prints_the_frontier_and_the_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quantize", "int4-weight-only", "--auto", "--budget", "kl=0.015,ppl=1.05,top1=0.8", *FEW_ROWS]
    assert main(["export", str(CHECKPOINTS / "tiny-qwen2-moe"), "-o", str(tmp_path / "bundle"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "size and accuracy" in out and "yes, chosen" in out
    overrides = re.findall(r"--override '(model\.layers\.\d\.\w+\.\*=int8)'", out)
    said = Bundle.open(tmp_path / "bundle").read_json("accuracy.json")["quantization"]
    assert overrides and len(overrides) == len(said["recipe"]["overrides"]) < 6  # groups of the three layers


def test_search_whose_choice_misses_the_budget_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = "kl=0,ppl=2,top1=0"  # another order of summation is a divergence
    arguments = ("--quantize", "int8-weight-only", "--auto", "--budget", budget, *FEW_ROWS)
    message = refusal(capsys, CHECKPOINTS / "tiny-qwen2", "-o", tmp_path / "bundle", *arguments)
    assert "mean KL is" in message and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantize", "int3"], "there is no recipe 'int3': use one of int8-w8a8"),
        (["--quantize", "mine.json"], "the recipe mine.json cannot be read"),
        (["--quantize", "int8-weight-only", "--budget", "kl"], "write it like kl=0.02,ppl=1.02,top1=0.97"),
        (["--quantize", "int8-weight-only", "--budget", "bleu=2"], "knows no 'bleu'"),
        (["--quantize", "int8-weight-only", "--override", "x"], "is not PATTERN=ACTION"),
        (["--quantize", "int8-weight-only", "--override", "nothing.*=keep"], "matches no site of the model"),
        (["--kernels", "qwenforge"], "--kernels is for --target ort-cpu with quantized weights"),
        (["--quantize", "int8-w8a8", "--kernels", "onnxruntime"], "--kernels is for --target ort-cpu"),
        (
            ["--quantize", "int4-weight-only", "--target", "portable", "--kernels", "qwenforge"],
            "--kernels is for --targ",
        ),
        (["--budget", "kl=1"], "--budget goes with --quantize RECIPE"),
        (["--auto"], "--auto goes with --quantize RECIPE"),
        (["--calibration-data", "x.txt"], "--calibration-data goes with --quantize RECIPE"),
        (["--work-folder", "w"], "--work-folder goes with --quantize RECIPE"),
        (["--dtype", "int8"], "quantize with --quantize int8-w8a8 or int8-weight-only"),
        (["--quantize", "fp8", "--target", "ort-cuda", "--device", "a100"], "a100 (SM 80) has no FP8 arithmetic"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused_with_what_to_do(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, CHECKPOINTS / "tiny-qwen2", "-o", tmp_path / "bundle", *arguments, "--no-verify")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("five.txt", b"one two three", "too few to calibrate with"),
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"\n\n", "too few to calibrate with"),
        ("latin.txt", "Stra\u00dfe ".encode("latin-1") * 400, "is not UTF-8 text (byte 4)"),
        ("broken.jsonl", b'{"text": "whole"}\n{"text": "half\n', "broken.jsonl:2 is not JSON"),
        ("other.jsonl", b'{"content": "x"}\n', "other.jsonl:1 has neither a 'text' nor 'messages'"),
    ],
)
@pytest.mark.parametrize("argument", ["--calibration-data", "--heldout-data"])
def test_text_that_is_of_no_use_is_refused_before_any_work(
    argument: str, name: str, content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / name
    text.write_bytes(content)
    arguments = ("--quantize", "int8-w8a8", argument, text)
    message = refusal(capsys, CHECKPOINTS / "tiny-qwen2", "-o", tmp_path / "bundle", *arguments)
    assert words in message and str(text) in message
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_held_out_text_that_was_calibrated_on_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = CHECKPOINTS / "heldout.txt"
    arguments = ("--quantize", "int8-w8a8", "--calibration-data", text, "--heldout-data", text)
    message = refusal(capsys, CHECKPOINTS / "tiny-qwen2", "-o", tmp_path / "bundle", *arguments)
    assert "hold text that the model was calibrated on" in message
    assert list(tmp_path.iterdir()) == []


def permute_vocabulary(folder: Path) -> None:
    """Give every token but the special ones another token's number."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    special = {each["content"] for each in content["added_tokens"]}
    tokens = [token for token in vocabulary if token not in special]
    numbers = np.random.default_rng(0).permutation([vocabulary[token] for token in tokens]).tolist()
    content["model"]["vocab"] = vocabulary | dict(zip(tokens, numbers, strict=True))
    path.write_text(json.dumps(content), encoding="utf-8")


def test_permuted_vocabulary_is_refused_where_ranges_depend_on_it(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    permute_vocabulary(dense)
    message = refusal(capsys, dense, "-o", tmp_path / "bundle", "--quantize", "int8-w8a8", *FEW_ROWS)
    assert "predicts the built-in sample" in message and "the tokenizer or the text is not this model's" in message
    assert not (tmp_path / "bundle").exists()


def test_permuted_vocabulary_is_told_where_weights_alone_are_quantized(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    permute_vocabulary(dense)
    arguments = ("--quantize", "int8-weight-only", "--budget", "kl=1,ppl=2,top1=0", *FEW_ROWS)
    told(dense, tmp_path / "bundle", capsys, arguments, "the tokenizer or the text is not this model's")


def told(
    checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    """The export succeeds, and a warning with ``words`` is in both streams, in the report and on its page."""
    assert main(["export", str(checkpoint), "-o", str(bundle), *arguments]) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if words in line]
    assert line.startswith("qwenforge: warning: ")
    warning = line.removeprefix("qwenforge: warning: ")
    assert f"  - {warning}\n" in out
    said = Bundle.open(bundle).read_json("accuracy.json")["quantization"]
    assert said["warnings"].count(warning) == 1
    assert warning in html.unescape((bundle / "accuracy.html").read_text(encoding="utf-8"))


def test_tokenizer_of_another_model_is_told(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(dense)  # byte by byte: the model was trained on other tokens
    arguments = ("--quantize", "int8-w8a8", "--budget", "kl=1,ppl=2,top1=0", *FEW_ROWS)
    words = r"the model predicts the built-in sample (34 documents) worse"
    told(dense, tmp_path / "bundle", capsys, arguments, words.partition(" (")[0] + " (")
    said = Bundle.open(tmp_path / "bundle").read_json("accuracy.json")["quantization"]["warnings"]
    assert any("check that the tokenizer" in warning for warning in said)
    assert len(said) == len(set(said))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("recipe", ["int8-weight-only", "int8-w8a8"])
def test_weight_that_is_not_a_number_is_refused_by_name(
    recipe: str, value: float, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weight(dense, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.__setitem__((3, 5), value))
    message = refusal(capsys, dense, "-o", tmp_path / "bundle", "--quantize", recipe, *FEW_ROWS)
    assert "model.layers.1.mlp.down_proj" in message and not (tmp_path / "bundle").exists()


def test_expert_that_never_fires_is_told_and_recorded(
    sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def silence(router: Any) -> None:
        router[5] = 0.0  # of fifteen others, four are above zero but for a few tokens

    change_weight(sparse, "model.layers.1.mlp.gate.weight", silence)
    arguments = ("--quantize", "int8-w8a8", "--budget", "kl=1,ppl=2,top1=0.1", *FEW_ROWS)
    assert main(["export", str(sparse), "-o", str(tmp_path / "bundle"), *arguments]) == 0
    err = capsys.readouterr().err
    assert "qwenforge: warning: " in err and "model.layers.1.mlp.experts" in err
    said = Bundle.open(tmp_path / "bundle").read_json("accuracy.json")["quantization"]
    assert any("model.layers.1.mlp.experts" in warning for warning in said["warnings"])
    assert said["expert_tokens"]["model.layers.1.mlp.experts"][5] < said["expert_floor"]


def test_channel_a_thousand_times_larger_is_told(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model computes what it did: what the channel gains, the matrices that read it lose."""
    layer = "model.layers.1"
    change_weight(dense, f"{layer}.input_layernorm.weight", lambda norm: norm[7].mul_(1024))
    for part in "qkv":
        change_weight(dense, f"{layer}.self_attn.{part}_proj.weight", lambda matrix: matrix[:, 7].div_(1024))
    bundle = tmp_path / "bundle"
    assert main(["export", str(dense), "-o", str(bundle), "--quantize", "int8-w8a8", *FEW_ROWS]) == 0
    err = capsys.readouterr().err
    told = re.search(rf"channel 7 of {layer}\.self_attn\.\w_proj's input is (\d+) times as large", err)
    assert told is not None and 200 < int(told[1]) < 10000


@pytest.mark.parametrize(
    ("word", "recipe_cache", "export_cache"), [("int8", "int8", None), ("fp32", None, "fp32"), (None, None, None)]
)
def test_cache_is_quantized_by_the_recipe_or_kept_by_the_export(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    word: str | None,
    recipe_cache: str | None,
    export_cache: str | None,
) -> None:
    asked: dict[str, Any] = {}

    def recorded(*_: Any, **options: Any) -> None:
        asked.update(options)
        raise UserError("that is enough")

    monkeypatch.setattr(export_module, "export_checkpoint", recorded)
    arguments = ["export", str(CHECKPOINTS / "tiny-qwen2"), "-o", str(tmp_path / "bundle")]
    arguments += ["--quantize", "int8-weight-only", *(["--cache", word] if word is not None else [])]
    assert main(arguments) == 1
    assert (asked["quantization"].recipe.cache, asked["cache"]) == (recipe_cache, export_cache)
