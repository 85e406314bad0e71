"""llama.cpp: its environment, compiled for this machine, and a checkpoint in its own quantized formats."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

from qwenforge.bench.peers import environments
from qwenforge.errors import UserError

WORKER = Path(__file__).with_name("llama_worker.py")
"""Serves measurements inside the environment; see :mod:`qwenforge.bench.worker` for the protocol."""
_CONVERTER = Path(__file__).with_name("llama_convert.py")

Format = Literal["f16", "q8_0", "q4_0"]

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


def build(python: Path, checkpoint: Path, folder: Path, number_format: Format) -> Path:
    """The checkpoint as a GGUF file of ``number_format`` in ``folder``, made unless it is there.

    Quantized by llama.cpp itself from float16, with its own choices for the vocabulary projection.

    Raises:
        UserError: the conversion fails.
    """
    model = folder / f"{number_format}.gguf"
    if not model.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [python, _CONVERTER, checkpoint, model, number_format]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise UserError(f"llama.cpp cannot convert {checkpoint}; its messages are above")
    return model
