"""``qwenforge eval``: perplexity as transformers gives it, and tasks of the lm-evaluation-harness without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qwenforge.cli.main import main

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 6
WINDOW = 64
_CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{continued}}"
generation_kwargs: {until: ["NEVER"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
_ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def log_probabilities(reference: Any, tokens: list[int]) -> Any:
    """log p [S - 1] of each token but the first in transformers, float64."""
    import torch

    with torch.no_grad():
        logits = reference(torch.tensor([tokens])).logits[0, :-1].double()
    return logits.log_softmax(1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def encode(text: str, checkpoint: Path) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


def test_perplexity_is_that_of_transformers_on_the_same_windows(
    bundle: Path, checkpoint: Path, reference: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert main(["eval", str(bundle), "--text", str(path), "--window", str(WINDOW), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    tokens = encode(TEXT, checkpoint)
    windows = [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]
    expected = torch.cat([log_probabilities(reference, window) for window in windows if len(window) > 1])
    assert said["perplexity"] == pytest.approx((-expected.mean()).exp().item(), rel=1e-4)
    assert said["scored_tokens"] == len(expected) and said["windows"] == len(windows) and said["window"] == WINDOW
    assert main(["eval", str(bundle), "--text", str(path), "--window", str(WINDOW), "--limit", "1"]) == 0
    assert f"over {WINDOW - 1} tokens" in capsys.readouterr().out


def test_tasks_are_scored_by_the_probabilities_and_texts_of_transformers(
    bundle: Path,
    checkpoint: Path,
    reference: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    pytest.importorskip("lm_eval", reason="needs the extra 'eval' (lm-eval)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    questions = ["abc", "hello wor", "one, two", "What is", "to be or"]
    choices = [" one", " two!", " 3"]
    rows = []
    for question in questions:
        start = encode(question, checkpoint)
        sums = [
            float(log_probabilities(reference, start + encode(choice, checkpoint))[len(start) - 1 :].sum())
            for choice in choices
        ]
        best = max(range(len(choices)), key=lambda index: sums[index])
        with torch.no_grad():
            made = reference.generate(
                torch.tensor([start]), max_new_tokens=6, do_sample=False, eos_token_id=[256, 257], pad_token_id=256
            )[0, len(start) :]
        from qwenforge.runtime.tokenizer import Tokenizer

        text = Tokenizer(checkpoint / "tokenizer.json").decode(made.tolist())
        rows.append({"question": question, "choices": choices, "answer": best, "continued": text})
    rows[-1] |= {"answer": (rows[-1]["answer"] + 1) % 3, "continued": "no"}  # type: ignore[operator]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("choice", _CHOICE), ("generate", _GENERATE), ("rolling", _ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("DATA", str(tmp_path / "rows.jsonl")))
    tasks = "local_choice,local_generate,local_rolling"
    assert main(["eval", str(bundle), "--tasks", tasks, "--include-path", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    scores = {(score["task"], score["metric"]): score["value"] for score in said["scores"]}
    assert scores["local_choice", "acc"] == pytest.approx(4 / 5)
    assert scores["local_generate", "exact_match"] == pytest.approx(4 / 5)
    begun = [[encode("<|endoftext|>", checkpoint)[0], *encode(question, checkpoint)] for question in questions]
    total = -sum(float(log_probabilities(reference, tokens).sum()) for tokens in begun)
    words = sum(len(question.split()) for question in questions)
    assert scores["local_rolling", "word_perplexity"] == pytest.approx(
        torch.tensor(total / words).exp().item(), rel=1e-3
    )
    assert main(["eval", str(bundle), "--tasks", "local_chioce", "--include-path", str(tmp_path)]) == 1
    assert "did you mean local_choice?" in capsys.readouterr().err


def test_missing_harness_is_told_with_the_command_that_installs_it(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(bundle), "--tasks", "mmlu"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "pip install 'qwenforge[eval]'" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "absent.txt"], "cannot be read as UTF-8 text"),
        (["--text", "TEXT", "--window", "100000"], "--window 100000 does not fit"),
        (["--text", "TEXT", "--few-shot", "2"], "--few-shot goes with --tasks"),
        (["--text", "TEXT", "--include-path", "."], "--include-path goes with --tasks"),
        (["--text", "SHORT"], "give a longer text"),
        (["--tasks", "mmlu", "--window", "8"], "--window goes with --text"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    arguments: list[str], words: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("x")
    places = {"TEXT": str(tmp_path / "text.txt"), "SHORT": str(tmp_path / "short.txt")}
    assert main(["eval", str(bundle), *(places.get(argument, argument) for argument in arguments)]) == 1
    assert words in capsys.readouterr().err
