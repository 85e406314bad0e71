"""Adding an engine to a bundle, so that a killed build leaves the bundle as it was.

The engine's file is named after its contents and moved in first; then the manifest that lists it replaces the old one
in one step; then the engine that the old manifest listed goes. Whoever looks in between finds a bundle that is whole.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from qwenforge.bundle import Bundle
from qwenforge.digests import sampled_sha256, sha256_file
from qwenforge.errors import BundleError
from qwenforge.manifest import MANIFEST_NAME, EngineRecord, FileRecord, Manifest, manifest_text


def engine_name(sha256: str) -> str:
    """The file name of an engine with this hash."""
    return f"engine.{sha256[:12]}.plan"


def scratch_path(bundle: Path) -> Path:
    """A new hidden path beside the bundle, on its disk, for a file that :func:`attach_engine` takes in."""
    bundle = bundle.resolve()
    return bundle.with_name(f".{bundle.name}.engine-{os.getpid()}-{secrets.token_hex(4)}")


def remove_dead_scratch(bundle: Path) -> None:
    """Delete what builds that were killed left beside the bundle; that of running processes stays."""
    bundle = bundle.resolve()
    for path in bundle.parent.glob(f".{bundle.name}.engine-*-*"):
        pid = path.name.rsplit("-", 2)[1]
        if pid.isdecimal() and not _is_running(int(pid)):
            path.unlink(missing_ok=True)


def attach_engine(bundle: Bundle, file: Path, record: EngineRecord) -> Manifest:
    """Move ``file`` into the bundle as its engine and return the new manifest; an older engine is deleted.

    ``record.file`` is replaced by the name that the file gets.

    Raises:
        BundleError: the bundle cannot be written to.
    """
    digest = sha256_file(file)
    name = engine_name(digest)
    listed = FileRecord(bytes=file.stat().st_size, sha256=digest, sampled_sha256=sampled_sha256(file))
    old = bundle.manifest.engine
    files = {key: value for key, value in bundle.manifest.files.items() if old is None or key != old.file}
    manifest = bundle.manifest.model_copy(
        update={"files": {**files, name: listed}, "engine": record.model_copy(update={"file": name})}
    )
    partial = bundle.path / f".{MANIFEST_NAME}.partial-{os.getpid()}"
    try:
        _flush(file)
        os.replace(file, bundle.path / name)
        partial.write_text(manifest_text(manifest), encoding="utf-8", newline="\n")
        _flush(partial)
        os.replace(partial, bundle.path / MANIFEST_NAME)
        if old is not None and old.file != name:
            (bundle.path / old.file).unlink(missing_ok=True)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if old is None or old.file != name:
            (bundle.path / name).unlink(missing_ok=True)
        raise BundleError(
            f"cannot write the engine into {bundle.path} ({error.strerror}); check its permissions and free space"
        ) from error
    return manifest


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
