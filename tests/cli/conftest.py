"""One tiny checkpoint and one export of it by the command line, shared by the tests of the verbs; not to be changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from support.checkpoints import make_checkpoint
from support.command_line import Finished, qwenforge


@dataclass(frozen=True)
class Exported:
    """A checkpoint, the bundle that ``qwenforge export --json`` made of it, and what the command said."""

    checkpoint: Path
    bundle: Path
    finished: Finished


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("command-line") / "checkpoint")


@pytest.fixture(scope="session")
def exported(checkpoint: Path) -> Exported:
    bundle = checkpoint.with_name("bundle")
    return Exported(checkpoint, bundle, qwenforge("export", checkpoint, "-o", bundle, "--json"))


@pytest.fixture
def bundle(exported: Exported) -> Path:
    """The bundle of ``exported``."""
    assert exported.finished.code == 0, exported.finished.err
    return exported.bundle
