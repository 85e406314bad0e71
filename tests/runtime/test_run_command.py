from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from qwenforge.cli.main import main
from qwenforge.runtime import LanguageModel


def _run(bundle: Path, *arguments: str) -> int:
    return main(["run", str(bundle), "--threads", "2", "--max-new-tokens", "12", *arguments])


def test_run_streams_the_generated_text(bundle: Path, model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(bundle, "--prompt", "hello") == 0
    assert capsys.readouterr().out == model.generate("hello", max_new_tokens=12).texts[0] + "\n"


def test_run_prints_several_sequences_in_order(
    bundle: Path, model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--n", "2", "--temperature", "1", "--seed", "3"]
    assert _run(bundle, "--prompt", "a", "--prompt", "hello", *options) == 0
    texts = model.generate(["a", "hello"], max_new_tokens=12, temperature=1.0, seed=3, n=2).texts
    titles = ["prompt 1, sample 1", "prompt 1, sample 2", "prompt 2, sample 1", "prompt 2, sample 2"]
    expected = "".join(f"--- {title}\n{text}\n" for title, text in zip(titles, texts, strict=True))
    assert capsys.readouterr().out == expected


def test_run_json_holds_one_entry_a_sequence(
    bundle: Path, model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(bundle, "--prompt", "a", "--prompt", "wörld", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert list(output) == ["prompt_tokens", "tokens", "text", "finish_reason"]
    assert output == model.generate(["a", "wörld"], max_new_tokens=12).to_dict()


def test_run_chat_uses_template_and_system_message(
    bundle: Path, model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(bundle, "--chat", "hi", "--system", "brief", "--json") == 0
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}]
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == [model.tokenizer.encode_chat(messages)]


def test_run_reads_prompt_from_stdin(
    bundle: Path, model: LanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert _run(bundle, "--prompt", "-", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == [model.tokenizer.encode("two\nlines")]


def test_run_says_when_the_capacity_ended_a_sequence(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(bundle, "--prompt", "x" * 254, "--stop", "never said") == 0
    assert "prompt 1 ended because prompt and answer reached the bundle's 256 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "prompt 1 has no tokens"),
        (["--prompt", "x" * 256], "prompt 1 has 256 tokens"),
        (["--prompt", "a\udcff"], "not valid Unicode at character 1"),
        (["--prompt", "a", "--system", "b"], "--system needs --chat"),
        (["--prompt", "-", "--prompt", "-"], "--prompt - is given more than once"),
        (["--prompt", "a", "--top-k", "3"], "top_k has no effect on greedy decoding"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_run_reports_user_error(
    bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert _run(bundle, *arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize("arguments", [[], ["--prompt", "a", "--chat", "b"], ["--prompt", "a", "--n", "0"]])
def test_run_refuses_wrong_usage(bundle: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _run(bundle, *arguments)
    assert stopped.value.code == 2
