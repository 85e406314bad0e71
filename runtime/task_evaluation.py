"""Scores of a bundle on tasks of EleutherAI's lm-evaluation-harness: its own tasks, or a folder of task files."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenforge.errors import UserError
from qwenforge.runtime.harness_model import harness_model
from qwenforge.runtime.language_model import LanguageModel


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name.
        metric: such as ``acc``, ``acc_norm`` or ``exact_match``, with the filter of the answers where that is not none.
        value: the figure.
        standard_error: by bootstrap or formula; None where the harness gives none.
        examples: how many were asked.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    examples: int


def evaluate_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    name: str,
    limit: int | None = None,
    include_path: Path | None = None,
    few_shot: int | None = None,
    unsafe_code: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> list[TaskScore]:
    """Ask ``model`` the ``tasks``, seeded.

    Args:
        model: the bundle.
        tasks: names that the harness knows, or task files in ``include_path`` define.
        name: what the model is called in the harness.
        limit: examples of each task at most, the first ones.
        include_path: a folder with task files (YAML).
        few_shot: solved examples before each question; None for the task's own number.
        unsafe_code: run the code that the model writes, which some tasks are scored by.
        progress: told what is being done and the fraction of it that is done.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        UserError: a task is unknown, or cannot be prepared, such as one whose data must be downloaded.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no folder; give the folder of the task files (*.yaml).")
    manager = TaskManager(include_path=str(include_path) if include_path is not None else None)
    _require_known(tasks, manager.all_tasks)
    try:
        results: Any = simple_evaluate(
            harness_model(model, name=name, progress=progress),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=few_shot,
            log_samples=False,
            confirm_run_unsafe_code=unsafe_code,
        )
    except (OSError, ValueError, KeyError) as error:
        # What the harness and its data sets raise, without a base of their own.
        raise UserError(
            f"lm-eval cannot run {', '.join(tasks)} ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "check the task file, and the network for tasks whose data are downloaded."
        ) from error
    return _scores(results)


def _require_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=1)
            guess = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(
                f"lm-eval knows no task {task!r}{guess}; 'lm-eval ls tasks' lists them, and --include-path adds yours."
            )


def _scores(results: Any) -> list[TaskScore]:
    """The harness's table of results, in which ``acc,none`` has its error in ``acc_stderr,none``."""
    found = []
    for task, figures in results["results"].items():
        samples = results.get("n-samples", {}).get(task, {})
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, int | float) and math.isfinite(error)
            found.append(
                TaskScore(
                    task=task,
                    metric=metric if kind == "none" else f"{metric} ({kind})",
                    value=float(value),
                    standard_error=float(error) if known else None,
                    examples=int(samples.get("effective", 0)),
                )
            )
    return found
