"""Ctrl-C during calibration: only the work folder stays, and the same command ends as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from qwenforge.bundle import Bundle
from support.command_line import Finished, command, finish, qwenforge
from support.source_tree import ROOT

CHECKPOINT = ROOT / "examples/checkpoints/tiny-qwen2"
ROWS = "48"
"""Enough that the layers take seconds, and a signal comes between two of them."""


def arguments(bundle: Path) -> list[str | Path]:
    recipe = ("--quantize", "int8-w8a8", "--calibration-rows", ROWS)
    return ["export", CHECKPOINT, "-o", bundle, *recipe, "--no-verify"]


def interrupted(bundle: Path) -> Finished:
    """``qwenforge export`` interrupted when it has calibrated the first piece of the model."""
    process = subprocess.Popen(
        command(*arguments(bundle)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Under nohup, or behind a shell's '&', an ignored SIGINT is inherited, and Python leaves it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not committed(bundle):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    return finish(process)


def committed(bundle: Path) -> dict[str, int]:
    """The pieces of the model that are calibrated, and when each was written."""
    records = bundle.parent.glob(f".{bundle.name}.quantization/calibration-*/piece-*.json")
    return {path.name: path.stat().st_mtime_ns for path in records}


def test_interrupted_calibration_is_taken_up_by_the_same_command_to_the_same_bits(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    stopped = interrupted(bundle)
    work = tmp_path / ".bundle.quantization"
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err == (
        f"qwenforge: what was calibrated is kept in {work}; the same command goes on there\nqwenforge: interrupted\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [work.name]
    before = committed(bundle)
    assert 1 <= len(before) < 5  # of embeddings, three layers and the vocabulary

    # A folder of the user's is not deleted: what was done before the interrupt is not done again.
    kept = tmp_path / "kept"
    work.rename(kept)
    assert qwenforge(*arguments(bundle), "--work-folder", kept).code == 0
    pieces = {path.name: path.stat().st_mtime_ns for path in kept.glob("calibration-*/piece-*.json")}
    assert len(pieces) > len(before) and before.items() <= pieces.items()

    reference = tmp_path / "reference"
    assert qwenforge(*arguments(reference)).code == 0
    taken_up, at_once = (Bundle.open(path, verify="full").manifest.files for path in (bundle, reference))
    same = ("model.onnx", "model.onnx.data", "prefill.onnx", "prefill.onnx.data", "accuracy.json")
    assert {name: taken_up[name].sha256 for name in same} == {name: at_once[name].sha256 for name in same}
