"""Where, when and with what figures were taken: the part of a result that is not the result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qwenforge.machine import describe

_PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch", "transformers")


def circumstances() -> dict[str, Any]:
    """``date``, ``commit`` (None outside a checkout; ends in ``+`` with local changes), ``machine``, ``packages``."""
    now = datetime.now(timezone.utc)
    return {"date": now.date().isoformat(), "commit": _commit(), "machine": _machine(), "packages": _packages()}


def _machine() -> dict[str, Any]:
    found = describe()
    return {
        **asdict(found.processor),
        "memory_bytes": found.memory_bytes,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _packages() -> dict[str, str]:
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in _PACKAGES if name in installed}


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
