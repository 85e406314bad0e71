"""A model larger than the memory that calibration may take: weights and activations pass a layer at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qwenforge.exporter.external_data import save_model
from support.exported_models import exported

LAYERS, WIDEST = 20, 2048
CHILD = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime
from qwenforge.calibration import recipes
from qwenforge.calibration.calibrate import calibrate
from qwenforge.calibration.data import CalibrationData
from qwenforge.exporter.external_data import load_model
from qwenforge.machine import high_water_mark
data = CalibrationData(np.random.default_rng(0).integers(0, 320, (8, 128)), "random tokens")
model = load_model(Path(sys.argv[1]))
before = high_water_mark("self")
calibrate(model, recipes.get(sys.argv[2]), data, work_folder=Path(sys.argv[3]), require_prediction=False)
print(high_water_mark("self") - before)
"""


def test_peak_memory_is_that_of_a_layer_not_of_the_model(tmp_path: Path) -> None:
    recipe = "int4-weight-only"
    model = exported("qwen2", hidden_size=1024, intermediate_size=WIDEST, num_hidden_layers=LAYERS).portable()
    save_model(model, tmp_path / "model.onnx")
    weights = (tmp_path / "model.onnx.data").stat().st_size
    command = [sys.executable, "-c", CHILD, str(tmp_path / "model.onnx"), recipe, str(tmp_path / "work")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    taken = int(finished.stdout)
    layer = weights / LAYERS
    print(f"{recipe}: {taken / 1e6:.0f} MB taken, {weights / 1e6:.0f} MB of weights, {layer / 1e6:.0f} MB a layer")
    # One layer mapped, one matrix of it (at most half of a layer) in a search with a handful of temporaries, and the
    # moments of the widest input in rounding.
    assert taken < 7 * layer + 28 * WIDEST**2 < 0.55 * weights
