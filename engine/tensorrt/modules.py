"""NVIDIA's Python module for a target: ``tensorrt``, or ``tensorrt_rtx`` with the same interface."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from qwenforge.errors import UnsupportedError, UserError
from qwenforge.manifest import LoweringRecord
from qwenforge.tensorrt_choice import TENSORRT_RTX

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Module by target."""

_INSTALL = {
    "tensorrt": "run pip install tensorrt, or use the system's Python on a Jetson, whose JetPack brings it",
    "tensorrt-rtx": "install the wheel of NVIDIA's TensorRT for RTX SDK",
}


def import_tensorrt(target: str) -> Any:
    """The module that builds engines for ``target``.

    Raises:
        UserError: it is not installed, or does not load; the message says how to install it.
    """
    name = MODULES[target]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"building for target {target} needs the Python module {name}: {_INSTALL[target]}.") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"the Python module {name} is installed but does not load ({error}): {_INSTALL[target]}."
        ) from error


def require_version(target: str, installed: str, lowering: LoweringRecord, export_command: str) -> None:
    """Make sure that the installed version takes a graph lowered so.

    Raises:
        UnsupportedError: it is older than the one that the graph was lowered for.
    """
    if target == TENSORRT_RTX:
        return
    if numbers(installed)[:2] < numbers(lowering.tensorrt)[:2]:
        raise UnsupportedError(
            f"the bundle was lowered for TensorRT {lowering.tensorrt} and {installed} is installed: install "
            f"{lowering.tensorrt} or newer, or export again with {export_command}."
        )


def numbers(version: str) -> tuple[int, ...]:
    """``11.4.0.106`` as (11, 4, 0, 106)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))
