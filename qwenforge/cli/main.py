"""The program ``qwenforge``: finds the verb, runs it, turns what went wrong into an exit code.

Exit codes: 0 done, 1 a user error or a missed bound, 2 usage, 130 interrupted, 141 the reader of our output went away.
An internal error keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType

from qwenforge import __version__
from qwenforge.cli import interrupts
from qwenforge.cli.base import EXIT_BROKEN_PIPE, EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER_ERROR, Command
from qwenforge.errors import UserError

VERBS: Mapping[str, str] = MappingProxyType(
    {
        "doctor": "show what this machine can export, build and run",
        "plan": "say what fits on a device and how fast it could be",
        "export": "turn a checkpoint into a verified bundle",
        "build": "compile the engine of a TensorRT bundle",
        "optimize": "run the graph passes on any ONNX model",
        "run": "generate text with a bundle",
        "eval": "measure a bundle's perplexity, or its score on tasks",
        "bench": "measure latency, throughput and memory of a bundle",
        "inspect": "show what is in a bundle, an ONNX model or an engine",
    }
)
"""Every verb and its one-line help, in pipeline order; verb ``x`` is implemented in ``qwenforge.cli.x``."""

_OPTIONAL = {"torch": "export", "transformers": "export", "matplotlib": "report", "lm_eval": "eval"}
"""Libraries that only some verbs need, and the extra that installs them."""
_DESCRIPTION = "Export a Qwen2-family checkpoint to a fast engine that is proven to say what the checkpoint says."
_EXAMPLE = """\
example:
  qwenforge export ./Qwen2-0.5B -o ./qwen2-bundle --target ort-cpu
  qwenforge run ./qwen2-bundle --prompt "Once upon a time"

'qwenforge VERB --help' explains a verb, with an example.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit code.

    Usage errors and ``--help`` leave through argparse's ``SystemExit``, as usual for a command line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with interrupts.remembered():
            try:
                return _dispatch(arguments)
            finally:
                sys.stdout.flush()
    except UserError as error:
        # A path or a library's message may hold line ends.
        print(f"qwenforge: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        if error.name not in _OPTIONAL:
            raise
        print(
            f"qwenforge: error: this needs {error.name}, which is not installed here; run "
            f"pip install 'qwenforge[{_OPTIONAL[error.name]}]'",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("qwenforge: interrupted", file=sys.stderr)
        # An exec() of text that the interrupt passed through has told CPython to end by the signal and not by our exit
        # code; the next exec() takes it back.
        exec("")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone: point stdout at nothing so that the interpreter's
        # last flush does not complain, and end with the code of a program that SIGPIPE stopped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def load_command(verb: str) -> Command:
    """Import the module of ``verb`` and create its command.

    Raises:
        RuntimeError: the module does not define exactly one command of that name (an internal error).
    """
    module = import_module(f"qwenforge.cli.{verb}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Command) and value.__module__ == module.__name__
    ]
    if len(found) != 1 or found[0].name != verb:
        raise RuntimeError(f"qwenforge.cli.{verb} must define exactly one Command named {verb!r}, it has {found}")
    return found[0]()


def _dispatch(arguments: list[str]) -> int:
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    command = load_command(verb) if verb is not None and verb in VERBS else None
    args = _parser(command).parse_args(arguments)
    if command is None:
        # argparse has already refused an unknown verb: only a bare `qwenforge` gets here.
        _parser(None).print_help()
        return EXIT_DONE
    return command.run(args)


def _parser(command: Command | None) -> argparse.ArgumentParser:
    """The parser of the program, with the arguments of ``command`` only: other verbs are not imported."""
    parser = argparse.ArgumentParser(
        prog="qwenforge",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qwenforge {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for name, summary in VERBS.items():
        subparser = verbs.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if command is not None and command.name == name:
            subparser.description = _filled(command.description)
            subparser.epilog = "example:\n" + _indented(command.example)
            command.add_arguments(subparser)
    return parser


def _filled(text: str) -> str:
    return textwrap.fill(text, width=min(100, shutil.get_terminal_size().columns - 2))


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.strip().splitlines())
