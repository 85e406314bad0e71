"""Lays qwenforge out in a folder as if it were installed, of links: ``python -P tests/gpu/layout.py FOLDER``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("exporter", "graph_passes", "plugins", "calibration", "engine", "runtime", "bench")


def main(folder: Path) -> None:
    """Replace what is in ``folder``: the package, its stages inside it, and the metadata that names its version."""
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "qwenforge"
    package.mkdir(parents=True)
    for source in (*(ROOT / "qwenforge").iterdir(), *(ROOT / stage for stage in STAGES)):
        (package / source.name).symlink_to(source)
    version = (ROOT / "VERSION").read_text(encoding="utf-8").strip()
    metadata = folder / f"qwenforge-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: qwenforge\nVersion: {version}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
