"""The program: verbs, help, exit codes, what goes to which stream."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest

from qwenforge import __version__
from qwenforge.cli import main as program
from qwenforge.cli.base import Command
from qwenforge.errors import CheckpointError


class _Failing(Command):
    """Stands in for ``doctor`` and raises what the test wants."""

    name = "doctor"
    help = "fail"
    description = "Fails."
    example = "qwenforge doctor"

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """None."""

    def run(self, args: argparse.Namespace) -> int:
        raise self._error


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(program, "load_command", lambda verb: _Failing(error))


def _exit_code(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as leaving:
        program.main(arguments)
    return leaving.value.code


def test_help_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["--help"]) == 0
    text = capsys.readouterr().out
    for verb, line in program.VERBS.items():
        assert verb in text
        assert line in text


def test_help_of_the_program_imports_no_verb() -> None:
    script = (
        "import sys\nfrom qwenforge.cli.main import VERBS, main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not [verb for verb in VERBS if 'qwenforge.cli.' + verb in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("verb", program.VERBS)
def test_help_of_a_verb_shows_description_and_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: qwenforge {verb} ")
    example = text.partition("\nexample:\n")[2]
    assert f"qwenforge {verb} " in example.replace("\n", " \n")


@pytest.mark.parametrize("verb", program.VERBS)
def test_help_line_of_a_verb_is_the_registered_one(verb: str) -> None:
    command = program.load_command(verb)
    assert command.name == verb
    assert command.help == program.VERBS[verb]
    assert command.description.strip().endswith(".")


def test_no_argument_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: qwenforge")


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"qwenforge {__version__}\n"


@pytest.mark.parametrize("arguments", [["launch"], ["doctor", "--jsn"], ["doctor", "--js"], ["export"]])
def test_usage_error_exits_2_and_keeps_stdout_clean(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: qwenforge")


def test_user_error_is_one_line_on_stderr_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fail_with(monkeypatch, CheckpointError("model.safetensors is truncated; download it again."))
    assert program.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "qwenforge: error: model.safetensors is truncated; download it again.\n"


def test_missing_optional_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fail_with(monkeypatch, ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert program.main(["doctor"]) == 1
    assert "pip install 'qwenforge[export]'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a bug"), ModuleNotFoundError("gone", name="qwenforge.cli.gone")])
def test_internal_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _fail_with(monkeypatch, error)
    with pytest.raises(type(error)) as raised:
        program.main(["doctor"])
    assert raised.value is error


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _fail_with(monkeypatch, KeyboardInterrupt())
    assert program.main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_reader_that_goes_away_leaves_no_traceback() -> None:
    script = (
        "import sys\nfrom types import SimpleNamespace\nfrom qwenforge.cli import main as program\n"
        "program.load_command = lambda verb: SimpleNamespace(name=verb, description='', example='',\n"
        "    add_arguments=lambda parser: None, run=lambda args: print('much') or 0)\n"
        "sys.exit(program.main(['doctor']))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        finished = subprocess.run(
            [sys.executable, "-c", script], stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert finished.stderr == ""
    assert finished.returncode == 141


def test_registered_verb_without_a_module_is_an_internal_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="launch"):
        program.load_command("launch")


def test_module_without_its_command_is_an_internal_error() -> None:
    with pytest.raises(RuntimeError, match="exactly one Command"):
        program.load_command("arguments")
