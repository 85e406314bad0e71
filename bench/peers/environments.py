"""Virtual environments of peers: made where they are not, so that no peer's packages meet ours."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwenforge.errors import UserError


def environment(
    folder: Path,
    *,
    imports: str,
    installs: Sequence[Sequence[str]],
    failure: str,
    variables: Mapping[str, str] | None = None,
) -> Path:
    """The Python of a virtual environment in ``folder`` that can import ``imports``.

    Args:
        folder: the environment, made unless it is there.
        imports: modules, as in an import statement; where they are all there, nothing is installed.
        installs: the arguments of one pip install after the other.
        failure: the sentence for a pip that fails; ``{packages}`` stands for what it was to install.
        variables: of the environment in which pip runs, beside ours.

    Raises:
        UserError: the packages cannot be installed.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if subprocess.run([python, "-c", f"import {imports}"], capture_output=True).returncode:
        for packages in installs:
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
            if subprocess.run(command, stdout=sys.stderr, env=os.environ | dict(variables or {})).returncode:
                raise UserError(failure.format(packages=" ".join(packages)))
    return python


def as_here(names: Sequence[str]) -> list[str]:
    """Requirements for the versions of ``names`` that run here."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]
