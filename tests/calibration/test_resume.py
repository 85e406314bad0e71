"""A calibration that was killed goes on where it was and ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenforge.calibration import recipes
from qwenforge.calibration.calibrate import CalibrationResult, calibrate
from qwenforge.calibration.data import CalibrationData
from qwenforge.calibration.progress import Progress
from qwenforge.errors import UserError
from support.exported_models import exported

RECIPE = recipes.get("int4-weight-only").changed(cache="int8", expert_floor=4, group_size=32)
CONFIG: dict[str, Any] = {"num_hidden_layers": 3, "num_experts": 4}


def _data(seed: int = 0) -> CalibrationData:
    return CalibrationData(np.random.default_rng(seed).integers(0, 320, (4, 32)), "random tokens")


def _calibrate(folder: Path, progress: Callable[[Progress], None] | None = None, **changes: Any) -> CalibrationResult:
    arguments: dict[str, Any] = {"recipe": RECIPE, "data": _data(), "threads": 2} | changes
    model = exported("qwen2_moe", **CONFIG).portable()
    return calibrate(model, work_folder=folder, progress=progress, require_prediction=False, **arguments)


def _bits(result: CalibrationResult) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.tobytes()) for name, tensor in result.plan.tensors.items()}


def _assert_same(left: CalibrationResult, right: CalibrationResult) -> None:
    assert _bits(left) == _bits(right)
    assert left.plan.sites == right.plan.sites
    assert left.plan.smoothed == right.plan.smoothed
    assert (left.coverage, left.outliers, left.warnings) == (right.coverage, right.outliers, right.warnings)
    assert left.mean_loss == right.mean_loss


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[CalibrationResult, list[Progress]]:
    reports: list[Progress] = []
    return _calibrate(tmp_path_factory.mktemp("whole"), reports.append), reports


class _Killed(Exception):
    """What stands for a power cut."""


def test_calibration_is_reproducible(whole: tuple[CalibrationResult, list[Progress]], tmp_path: Path) -> None:
    _assert_same(_calibrate(tmp_path), whole[0])


def test_calibration_killed_at_every_fourth_step_ends_with_the_same_bits(
    whole: tuple[CalibrationResult, list[Progress]], tmp_path: Path
) -> None:
    steps = len(whole[1])
    assert steps > 40
    done: list[int] = []
    for stop in range(2, steps, 4):
        seen = 0

        def kill(report: Progress, stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            done.append(report.done)
            if seen == min(stop, 9):  # the same folder: each run gets a little further than the one before
                raise _Killed

        try:
            result = _calibrate(tmp_path, kill)
        except _Killed:
            continue
        _assert_same(result, whole[0])
        break
    else:
        _assert_same(_calibrate(tmp_path), whole[0])
    assert done[-1] > 0


def test_calibration_killed_by_the_system_ends_with_the_same_bits(
    whole: tuple[CalibrationResult, list[Progress]], tmp_path: Path
) -> None:
    source = textwrap.dedent(
        f"""
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = {sys.path!r}
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_resume
        count = 0
        def kill(report):
            global count
            count += 1
            if report.piece == 2 and report.what == "running the model":
                os.kill(os.getpid(), signal.SIGKILL)
        test_resume._calibrate(Path(sys.argv[1]), kill)
        """
    )
    # Random checkpoints are the same in every process; their place on disk is part of what a calibration is of.
    place = exported("qwen2_moe", **CONFIG).checkpoint.folder
    source = source.replace("import test_resume\n", f"import test_resume\ntest_resume._use({str(place)!r})\n")
    process = subprocess.run([sys.executable, "-c", source, str(tmp_path)], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    assert (tmp_path / "piece-1.json").exists() and not (tmp_path / "piece-2.json").exists()
    resumed: list[Progress] = []
    _assert_same(_calibrate(tmp_path, resumed.append), whole[0])
    assert all(report.piece >= 2 for report in resumed)


def _use(folder: str) -> None:
    """Take the checkpoint of the process that started this one."""
    from qwenforge.exporter.checkpoint import Checkpoint
    from support import exported_models

    def same(*arguments: Any, **options: Any) -> Any:
        import onnx_ir as ir

        from qwenforge.exporter.trace import trace
        from qwenforge.graph_passes.pipeline import optimize

        checkpoint = Checkpoint.open(folder)
        traced = trace(checkpoint, ir.DataType.FLOAT)
        fused = optimize(traced.model, positions=exported_models.POSITIONS).model
        return exported_models.Exported(checkpoint, traced, fused)

    globals()["exported"] = same


def test_progress_counts_up_to_the_whole_calibration(whole: tuple[CalibrationResult, list[Progress]]) -> None:
    reports = whole[1]
    assert [report.done for report in reports] == sorted(report.done for report in reports)
    assert reports[-1].done == reports[-1].total == reports[-1].pieces * 4 * 32
    assert all(report.tokens_per_second > 0 and report.seconds_left is not None for report in reports[-5:])


def test_finished_calibration_is_not_done_again(
    whole: tuple[CalibrationResult, list[Progress]], tmp_path: Path
) -> None:
    _calibrate(tmp_path)
    reports: list[Progress] = []
    _assert_same(_calibrate(tmp_path, reports.append), whole[0])
    assert not reports
    assert not list((tmp_path / "values").iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": RECIPE.changed(group_size=16)}, "another recipe"),
        ({"data": _data(1)}, "another data"),
        ({"threads": 1}, "another threads"),
    ],
)
def test_work_folder_of_another_calibration_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(_Killed):
        _calibrate(tmp_path, _raise)
    with pytest.raises(UserError, match=said):
        _calibrate(tmp_path, **changes)


def test_threads_are_those_of_the_run_that_is_gone_on_with(
    whole: tuple[CalibrationResult, list[Progress]], tmp_path: Path
) -> None:
    with pytest.raises(_Killed):
        _calibrate(tmp_path, _raise)
    _assert_same(_calibrate(tmp_path, threads=None), whole[0])


def _raise(_: Progress) -> None:
    raise _Killed


def test_work_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="as work folder"):
        _calibrate(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
