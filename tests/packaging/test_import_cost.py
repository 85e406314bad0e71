"""Importing is cheap: heavy libraries wait until they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qwenforge.cli.main import VERBS
from support.source_tree import module_names

HEAVY = (
    "lm_eval",
    "matplotlib",
    "lm_eval",
    "matplotlib",
    "onnxruntime",
    "onnxscript",
    "tensorrt",
    "torch",
    "transformers",
)
IMPORT_SECONDS = 0.3
_REPORT_HEAVY = f"import sys; found = [name for name in {HEAVY} if name in sys.modules]; assert not found, found"


def _python(script: str) -> str:
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_importing_qwenforge_is_fast() -> None:
    script = "import time; start = time.perf_counter(); import qwenforge; print(time.perf_counter() - start)"
    # The best of three: the machine may be busy with something else.
    assert min(float(_python(script)) for _ in range(3)) < IMPORT_SECONDS


def test_importing_qwenforge_imports_nothing_heavy() -> None:
    _python(f"import qwenforge\n{_REPORT_HEAVY}\nassert 'numpy' not in sys.modules")


def test_importing_every_module_imports_nothing_heavy() -> None:
    imports = "\n".join(f"import {name}" for name in module_names())
    _python(f"{imports}\n{_REPORT_HEAVY}")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_imports_nothing_heavy(verb: str) -> None:
    script = (
        f"from qwenforge.cli.main import main\ntry:\n    main(['{verb}', '--help'])\nexcept SystemExit:\n    pass\n"
    )
    _python(script + _REPORT_HEAVY)
