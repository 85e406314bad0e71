"""Writing a bundle so that a killed export leaves the old bundle, or nothing, and never half of one."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from qwenforge import __version__
from qwenforge.atomic_folder import LockedFolder, clean_up_after_dead_writers, replace_folder, sync_tree
from qwenforge.digests import header_sha256, sampled_sha256, sha256_file
from qwenforge.errors import BundleError
from qwenforge.manifest import (
    ACCURACY,
    MANIFEST_NAME,
    BundleFacts,
    FileRecord,
    LinkedFileRecord,
    Manifest,
    check_file_name,
    load_manifest_json,
    manifest_text,
)
from qwenforge.reference_logits import ReferenceLogits

MAX_ACCURACY_BYTES = 2 * 1024 * 1024


class BundleWriter:
    """Writes a bundle into a hidden sibling of ``out`` and swaps it in on :meth:`commit`.

    Use it as a context manager; leaving without a commit deletes what was written and leaves ``out`` as it was. Every
    file in ``directory`` at commit time becomes part of the bundle; one with several hard links is recorded as shared
    with the checkpoint (``--weights link``).

    ``out`` may be absent, an empty folder, or a qwenforge bundle with no files of anybody else in it; anything else
    raises BundleError, so that an export never deletes what it did not write.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        # Through a symbolic link the folder it points to is replaced, not the link.
        self._out = Path(os.path.realpath(out))
        self._folder: LockedFolder | None = None

    def __enter__(self) -> BundleWriter:
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            clean_up_after_dead_writers(self._out)
            _check_replaceable(self._out)
            self._folder = LockedFolder(self._out)
        except OSError as error:
            raise BundleError(f"cannot write beside {self._out} ({error.strerror}); choose another path") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            folder, self._folder = self._folder, None
            folder.unlock()
            shutil.rmtree(folder.path)

    @property
    def directory(self) -> Path:
        """The folder to write files into, until the commit."""
        if self._folder is None:
            raise RuntimeError("BundleWriter is used outside its 'with' block or after its commit")
        return self._folder.path

    def add_file(self, source: str | os.PathLike[str], name: str | None = None) -> Path:
        """Copy the file ``source`` into the bundle as ``name`` (default: its own name)."""
        target = self._new_path(name or Path(source).name)
        shutil.copyfile(source, target)
        return target

    def add_text(self, name: str, text: str) -> Path:
        """Write ``text`` in UTF-8 as the bundle's file ``name``."""
        target = self._new_path(name)
        target.write_text(text, encoding="utf-8", newline="\n")
        return target

    def add_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as the bundle's JSON file ``name``; ValueError on NaN and infinities."""
        return self.add_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def add_accuracy(self, report: dict[str, Any], references: Sequence[ReferenceLogits] = ()) -> Path:
        """Write accuracy.json: ``report`` and, under ``references``, the reference logits.

        Raises ValueError above 2 MB: keep fewer prompts, positions or logits.
        """
        path = self.add_json(ACCURACY, {**report, "references": [reference.to_json() for reference in references]})
        if (size := path.stat().st_size) > MAX_ACCURACY_BYTES:
            raise ValueError(f"{ACCURACY} would take {size} bytes, more than {MAX_ACCURACY_BYTES}")
        return path

    def commit(self, facts: BundleFacts, *, known_sha256: Mapping[str, str] | None = None) -> Path:
        """Hash the files, write the manifest, flush everything to disk and swap the bundle in; returns its path.

        ``known_sha256`` holds hashes computed while files were written, by name; these are not read again in full.
        Raises BundleError when ``out`` has meanwhile become something that must not be replaced.
        """
        folder = self.directory
        manifest = _manifest(folder, facts, known_sha256 or {})
        (folder / MANIFEST_NAME).write_text(manifest_text(manifest), encoding="utf-8", newline="\n")
        sync_tree(folder)
        _check_replaceable(self._out)
        try:
            leftover = replace_folder(folder, self._out)
        except OSError as error:
            raise BundleError(
                f"cannot put the bundle at {self._out} ({error.strerror}); choose another path"
            ) from error
        if self._folder is not None:
            self._folder.unlock()
            self._folder = None
        if leftover is not None:
            try:
                shutil.rmtree(leftover)
            except OSError as error:
                raise BundleError(
                    f"the new bundle is at {self._out}, but the old one could not be deleted ({error.strerror}); "
                    f"delete {leftover} yourself"
                ) from error
        return self._out

    def _new_path(self, name: str) -> Path:
        target = self.directory / check_file_name(name)
        if os.path.lexists(target):
            raise ValueError(f"the bundle already has a file {name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def _manifest(folder: Path, facts: BundleFacts, known_sha256: Mapping[str, str]) -> Manifest:
    files: dict[str, FileRecord] = {}
    linked: dict[str, LinkedFileRecord] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{name} is neither a regular file nor a folder")
        if path.is_dir():
            continue
        status, sampled = path.stat(), sampled_sha256(path)
        if status.st_nlink > 1:
            header = header_sha256(path)
            linked[name] = LinkedFileRecord(bytes=status.st_size, header_sha256=header, sampled_sha256=sampled)
        else:
            whole = known_sha256.get(name) or sha256_file(path)
            files[name] = FileRecord(bytes=status.st_size, sha256=whole, sampled_sha256=sampled)
    return Manifest(
        **{name: getattr(facts, name) for name in BundleFacts.model_fields},
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        qwenforge_version=__version__,
        files=files,
        linked_files=linked,
    )


def _check_replaceable(out: Path) -> None:
    """Raise BundleError unless ``out`` may be replaced without deleting anything that is not ours."""
    if not out.exists():
        return
    if not out.is_dir():
        raise BundleError(f"{out} is a file; choose another path for the bundle")
    if os.path.ismount(out):
        raise BundleError(f"{out} is a mount point and cannot be replaced; choose a folder inside it")
    if not any(out.iterdir()):
        return
    try:
        fields = load_manifest_json(out)
    except BundleError as error:
        raise BundleError(f"{out} is not empty and is not a bundle; choose another path") from error
    files, linked = fields.get("files"), fields.get("linked_files", {})
    if "schema_version" not in fields or not isinstance(files, dict) or not isinstance(linked, dict):
        raise BundleError(f"{out} is not empty and is not a bundle; choose another path")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    if foreign := present - files.keys() - linked.keys() - {MANIFEST_NAME}:
        raise BundleError(
            f"{out} holds {min(foreign)}, which is not part of the bundle there and would be deleted; "
            "move it away or choose another path"
        )
