"""Small TensorRT bundles, each exported once in a test run, and builds of them inside the stand-in."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qwenforge.engine.export import export_checkpoint
from qwenforge.tensorrt_choice import choose
from support.checkpoints import Kind, make_checkpoint
from support.plugin_library import plugin_library
from support.rtx_standin import standin

LENGTH = 64
_BUNDLES: dict[str, tuple[Kind, dict[str, Any], dict[str, Any]]] = {
    "rtx": ("qwen2", {}, {"target": "tensorrt-rtx"}),
    "rtx moe": ("qwen2_moe", {}, {"target": "tensorrt-rtx"}),
    "rtx inputs": ("qwen2", {}, {"target": "tensorrt-rtx", "weights_as": "inputs"}),
    "rtx deep": ("qwen2", {"num_hidden_layers": 16}, {"target": "tensorrt-rtx"}),
    "h200": ("qwen2", {}, {"target": "tensorrt", "device": "h200"}),
    "h200 plugin": ("qwen2", {}, {"target": "tensorrt", "device": "h200", "attention": "plugin"}),
    "orin": ("qwen2", {}, {"target": "tensorrt", "device": "jetson-orin-nano", "version": "10.3"}),
    "cpu": ("qwen2", {}, {"target": "ort-cpu"}),
}
_FOLDER = TemporaryDirectory()


def bundle(name: str, place: Path) -> Path:
    """A copy of the bundle ``name`` in ``place``, to do with as one likes."""
    return Path(shutil.copytree(_exported(name), place / "bundle"))


@functools.cache
def _exported(name: str) -> Path:
    kind, config, wishes = _BUNDLES[name]
    path = Path(_FOLDER.name) / name.replace(" ", "-")
    checkpoint = _checkpoint(kind, json.dumps(config))
    export_checkpoint(
        checkpoint,
        path,
        target=wishes["target"],
        max_length=LENGTH,
        max_batch=4,
        verify_result=False,
        choice=choose(**wishes) if wishes["target"] != "ort-cpu" else None,
    )
    return path


@functools.cache
def _checkpoint(kind: Kind, config: str) -> Path:
    path = Path(_FOLDER.name) / f"checkpoint-{kind}-{len(config)}"
    return make_checkpoint(path, kind, dtype="bfloat16", **json.loads(config))


def build(folder: Path, *options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``qwenforge build`` of a bundle, in the stand-in, with the plugin library at hand."""
    environment = {"QWENFORGE_PLUGIN_LIBRARY": str(plugin_library()), **environment}
    return standin().run("-m", "qwenforge", "build", folder, *options, **environment)


def built(folder: Path, *options: str | Path, **environment: str) -> dict[str, Any]:
    """The JSON of a build that succeeds."""
    finished = build(folder, *options, "--json", **environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report: dict[str, Any] = json.loads(finished.stdout)
    return report
