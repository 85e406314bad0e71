"""NVIDIA ModelOpt: its environment, and the logits of its fake-quantized PyTorch models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.bench.peers import environments
from qwenforge.errors import UserError

WORKER = Path(__file__).with_name("nvidia_modelopt_worker.py")
_NEEDS = ("torch", "transformers")


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with nvidia-modelopt, made in ``folder`` unless it is there.

    Raises:
        UserError: the packages cannot be installed.
    """
    needed = environments.as_here(_NEEDS)
    return environments.environment(
        folder,
        imports="modelopt.torch.quantization, transformers",
        # torch alone and first, so that resolving the others cannot choose another build of it.
        installs=(needed[:1], ["nvidia-modelopt", "requests", *needed[1:]]),
        failure=f"{{packages}} cannot be installed in {folder}; install them there yourself",
    )


def version(python: Path) -> str:
    """The version of nvidia-modelopt."""
    code = "import importlib.metadata as m; print(m.version('nvidia-modelopt'))"
    return (
        "nvidia-modelopt "
        + subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    )


def logits(
    python: Path,
    checkpoint: Path,
    config: str,
    calibration: npt.NDArray[np.int64],
    windows: npt.NDArray[np.int64],
    folder: Path,
) -> npt.NDArray[np.float32]:
    """Logits [B, S, V] of ``windows`` [B, S] by ``checkpoint`` quantized with ModelOpt's ``config``, in fp32.

    Args:
        python: the interpreter of :func:`environment`.
        checkpoint: a Hugging Face folder.
        config: the name of one of ``modelopt.torch.quantization``'s configurations.
        calibration: [rows, tokens], shown to the model while its ranges are collected.
        windows: the text to be judged by.
        folder: for files that both processes read.

    Raises:
        UserError: ModelOpt fails.
    """
    files = {name: folder / f"{name}.npy" for name in ("calibration", "windows", "logits")}
    np.save(files["calibration"], calibration)
    np.save(files["windows"], windows)
    request: dict[str, Any] = {"checkpoint": str(checkpoint), "config": config}
    request |= {name: str(path) for name, path in files.items()}
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run([python, WORKER], input=json.dumps(request), text=True, stdout=sys.stderr, env=offline)
    if done.returncode:
        raise UserError(f"ModelOpt fails with {config} on {checkpoint}; its messages are above")
    answer: npt.NDArray[np.float32] = np.load(files["logits"])
    return answer
