"""The accuracy comparison: who takes part, and how llama.cpp is asked, without llama.cpp."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qwenforge.bench.peers import llama, llama_convert
from qwenforge.bench.quantization_accuracy import LLAMA_FORMATS, MODELOPT_CONFIGS, Peers, subjects
from qwenforge.calibration import recipes
from qwenforge.errors import UserError

WORKER = """
import json, sys
import numpy as np
request = json.load(sys.stdin)
windows = np.load(request["windows"])
if request["model"].endswith("broken.gguf"):
    sys.exit(3)
np.save(request["logits"], np.eye(8, dtype=np.float32)[windows])
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that answers with a one-hot row for each token."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(llama, "_LOGITS_WORKER", script)


def _names(peers: Peers, widths: set[int]) -> list[str]:
    return [subject.name for subject in subjects(peers, widths)]


def test_every_recipe_takes_part_and_peers_only_where_they_are() -> None:
    alone = _names(Peers(), {256})
    assert {f"qwenforge {name}" for name in recipes.NAMES} <= set(alone)
    assert not any(name.startswith(("ModelOpt", "llama.cpp")) for name in alone)
    python = Path(sys.executable)
    everybody = _names(Peers(modelopt=python, llama=python), {256, 512})
    assert {f"ModelOpt {config}" for config in MODELOPT_CONFIGS} <= set(everybody)
    assert {f"llama.cpp {number_format.upper()}" for number_format in LLAMA_FORMATS} <= set(everybody)
    assert len(everybody) == len(set(everybody))


def test_k_quants_are_left_out_where_a_row_is_no_multiple_of_their_block() -> None:
    names = _names(Peers(llama=Path(sys.executable)), {128, 256})
    assert "llama.cpp Q4_0" in names and "llama.cpp Q4_K_M" not in names


def test_equals_stand_beside_each_other() -> None:
    formats = [subject.format for subject in subjects(Peers(llama=Path(sys.executable)), {256})]
    assert formats == sorted(formats)


@pytest.mark.usefixtures("worker")
def test_llama_logits_are_those_of_the_worker(tmp_path: Path) -> None:
    windows = np.array([[1, 2, 3], [7, 0, 5]])
    found = llama.logits(Path(sys.executable), tmp_path / "model.gguf", windows, tmp_path)
    np.testing.assert_array_equal(found.argmax(-1), windows)


@pytest.mark.usefixtures("worker")
def test_llama_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llama\.cpp cannot run .*broken\.gguf"):
        llama.logits(Path(sys.executable), tmp_path / "broken.gguf", np.zeros((1, 2), np.int64), tmp_path)


def test_converter_reads_bfloat16_to_the_bit() -> None:
    values = np.array([1.5, -0.0078125, 3e38, 1e-40], ml_dtypes.bfloat16)
    found = llama_convert._values(values.view(np.uint8), "BF16")
    np.testing.assert_array_equal(found, values.astype(np.float32))
