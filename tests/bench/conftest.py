"""A tiny bundle that runs, written without an export; not to be changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.checkpoints import make_checkpoint
from support.ort_models import write_qwen2_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    return write_qwen2_bundle(make_checkpoint(folder / "checkpoint"), folder / "bundle")
