"""llama.cpp: its environment, compiled for this machine, and a checkpoint in its own quantized formats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from qwenforge.bench.peers import environments
from qwenforge.errors import UserError

WORKER = Path(__file__).with_name("llama_worker.py")
"""Serves measurements inside the environment; see :mod:`qwenforge.bench.worker` for the protocol."""
_CONVERTER = Path(__file__).with_name("llama_convert.py")
_LOGITS_WORKER = Path(__file__).with_name("llama_logits_worker.py")

Format = Literal["f16", "q8_0", "q4_0", "q4_k_m"]

K_QUANT_BLOCK = 256
"""Elements of a row that a K-quant stores together; rows of other widths fall back to other formats."""

_PACKAGES = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
_CMAKE_ARGUMENTS = (
    "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DMTMD_BUILD=OFF"
)


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with llama.cpp, compiled in ``folder`` unless it is there (10 minutes).

    Raises:
        UserError: the packages cannot be installed; it takes a C++ compiler and CMake.
    """
    return environments.environment(
        folder,
        imports="llama_cpp, gguf",
        # Its wheels, where there are any, are for the oldest processors.
        installs=(["--no-binary", "llama-cpp-python", *_PACKAGES],),
        failure=f"llama.cpp cannot be compiled in {folder}; its messages are above. Install a C++ compiler and CMake, "
        "or name an environment of your own with --llama-python",
        variables={"CMAKE_ARGS": _CMAKE_ARGUMENTS},
    )


def version(python: Path) -> str:
    """The version of llama.cpp's Python package, which carries llama.cpp's source."""
    code = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return f"llama-cpp-python {found}, compiled for this processor"


def build(
    python: Path, checkpoint: Path, folder: Path, number_format: Format, *, keep_vocabulary: bool = False
) -> Path:
    """The checkpoint as a GGUF file of ``number_format`` in ``folder``, made unless it is there.

    Quantized by llama.cpp itself from float16, with its own choices for the vocabulary projection, unless embedding and
    projection are to be kept in float16; a folder holds files of one kind.

    Raises:
        UserError: the conversion fails.
    """
    model = folder / f"{number_format}.gguf"
    if not model.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [python, _CONVERTER, checkpoint, model, number_format, *(["keep-vocabulary"] * keep_vocabulary)]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise UserError(f"llama.cpp cannot convert {checkpoint}; its messages are above")
    return model


def logits(python: Path, model: Path, windows: npt.NDArray[np.int64], folder: Path) -> npt.NDArray[np.float32]:
    """Logits [B, S, V] of ``windows`` [B, S] by the GGUF file ``model``, on the CPU with a float32 cache.

    Args:
        python: the interpreter of :func:`environment`.
        model: what :func:`build` made.
        windows: tokens.
        folder: for files that both processes read.

    Raises:
        UserError: llama.cpp fails.
    """
    files = {name: folder / f"llama-{name}.npy" for name in ("windows", "logits")}
    np.save(files["windows"], windows)
    request = {"model": str(model), **{name: str(path) for name, path in files.items()}}
    done = subprocess.run([python, _LOGITS_WORKER], input=json.dumps(request), text=True, stdout=sys.stderr)
    if done.returncode:
        raise UserError(f"llama.cpp cannot run {model}; its messages are above")
    answer: npt.NDArray[np.float32] = np.load(files["logits"])
    return answer
