"""``qwenforge eval``: how well a bundle predicts a text, or answers tasks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qwenforge.cli.arguments import add_bundle, add_json, add_plugin_library, add_threads, positive_int
from qwenforge.cli.base import EXIT_DONE, Command
from qwenforge.errors import UserError

if TYPE_CHECKING:
    from qwenforge.runtime import LanguageModel

Progress = Callable[[str, float], None]


class EvalCommand(Command):
    """Perplexity on a text, or scores on tasks of the lm-evaluation-harness."""

    name: ClassVar[str] = "eval"
    help: ClassVar[str] = "measure a bundle's perplexity, or its score on tasks"
    description: ClassVar[str] = (
        "Measure a bundle as it runs: the perplexity of a text, window by window, or the score on tasks of "
        "EleutherAI's lm-evaluation-harness (pip install 'qwenforge[eval]'), by name or from your own task files. Most "
        "of the harness's tasks download their data."
    )
    example: ClassVar[str] = """
qwenforge eval ./tiny-bundle --text examples/checkpoints/heldout.txt --window 256
qwenforge eval ./qwen2-bundle --tasks mmlu,gsm8k --limit 100 --json
qwenforge eval ./qwen2-bundle --tasks my_task --include-path ./my-tasks
"""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add_bundle(parser)
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text to score")
        what.add_argument("--tasks", metavar="TASK[,TASK]", help="tasks of the lm-evaluation-harness")
        parser.add_argument(
            "--window",
            type=positive_int,
            metavar="N",
            help="tokens of a window of text (default: 2048, or the context)",
        )
        parser.add_argument(
            "--limit", type=positive_int, metavar="N", help="windows of the text, or examples of each task, at most"
        )
        parser.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with task files of your own")
        parser.add_argument(
            "--few-shot", type=int, metavar="N", help="solved examples before each (default: the task's)"
        )
        parser.add_argument(
            "--confirm-run-unsafe-code",
            action="store_true",
            help="run the code that the model writes, for tasks that are scored so (HumanEval)",
        )
        add_threads(parser)
        add_plugin_library(parser)
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print perplexity or scores; UserError when the bundle, the text or a task cannot be used."""
        from qwenforge.runtime import load

        _refuse_mixed(args)
        text = _read(args.text) if args.text is not None else None
        if text is None:
            import lm_eval  # noqa: F401  # before the bundle is loaded: the message says how to install it
        model = load(args.bundle, threads=args.threads, plugin_library=args.plugin_library)
        with _progress() as progress:
            report = _score_text(model, text, args, progress) if text is not None else _tasks(model, args, progress)
        if args.json:
            print(json.dumps(report, indent=1))
        else:
            _print(report)
        return EXIT_DONE


def _refuse_mixed(args: argparse.Namespace) -> None:
    given = {
        "--include-path": args.include_path is not None,
        "--few-shot": args.few_shot is not None,
        "--confirm-run-unsafe-code": args.confirm_run_unsafe_code,
    }
    wrong = "--window" if args.tasks and args.window else next((name for name, set_ in given.items() if set_), None)
    if wrong is not None and (args.text is not None or wrong == "--window"):
        raise UserError(f"{wrong} goes with {'--text' if args.tasks else '--tasks'}; leave it out.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); give another file.") from error


def _score_text(model: LanguageModel, text: str, args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    from qwenforge.runtime.perplexity import score_text

    tokens = model.tokenizer.encode(text, add_special_tokens=False)
    score = score_text(model, tokens, window=args.window, limit=args.limit, progress=progress)
    return {
        "bundle": str(args.bundle),
        "text": str(args.text),
        "perplexity": score.perplexity,
        "loss": score.loss,
        "tokens": score.tokens,
        "scored_tokens": score.scored,
        "windows": score.windows,
        "window": score.window,
    }


def _tasks(model: LanguageModel, args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    from dataclasses import asdict

    from qwenforge.runtime.task_evaluation import evaluate_tasks

    scores = evaluate_tasks(
        model,
        [task.strip() for task in args.tasks.split(",") if task.strip()],
        name=args.bundle.resolve().name,
        limit=args.limit,
        include_path=args.include_path,
        few_shot=args.few_shot,
        unsafe_code=args.confirm_run_unsafe_code,
        progress=progress,
    )
    return {"bundle": str(args.bundle), "limit": args.limit, "scores": [asdict(score) for score in scores]}


@contextmanager
def _progress() -> Iterator[Progress]:
    """Draws where standard error is a terminal, and lets an interrupt through everywhere."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from qwenforge.cli.interrupts import raise_if_interrupted

    console = Console(stderr=True)
    if not console.is_interactive:
        yield lambda _, __: raise_if_interrupted()
        return
    columns = (TextColumn("{task.description:<28.28}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("load", total=1.0)

        def show(what: str, done: float) -> None:
            raise_if_interrupted()
            bar.update(task, description=what, completed=done)

        yield show


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if "perplexity" in report:
        console.print(
            f"perplexity {report['perplexity']:.4f} over {report['scored_tokens']} tokens of {report['text']}, in "
            f"{report['windows']} windows of {report['window']}",
            markup=False,
        )
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("value", "standard error", "examples"):
        table.add_column(heading, justify="right")
    for score in report["scores"]:
        error = score["standard_error"]
        table.add_row(
            score["task"],
            score["metric"],
            f"{score['value']:.4f}",
            "" if error is None else f"{error:.4f}",
            str(score["examples"]),
        )
    console.print(table)
