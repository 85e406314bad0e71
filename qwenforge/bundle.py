"""The bundle: one folder that holds everything an engine needs, and proof that it is whole.

:class:`Bundle` opens a folder, refusing one that is incomplete, damaged, changed or of a newer schema.
:class:`BundleWriter` makes one. docs/bundle.md describes the format.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Literal

from qwenforge.bundle_writer import BundleWriter
from qwenforge.digests import QUICK_LIMIT, header_sha256, sampled_sha256, sha256_file
from qwenforge.errors import BundleError
from qwenforge.manifest import (
    ACCURACY,
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    MODEL_NAME,
    RESERVED_NAMES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    BundleFacts,
    FileRecord,
    LinkedFileRecord,
    Manifest,
    read_manifest,
)
from qwenforge.reference_logits import ReferenceLogits

__all__ = ["Bundle", "BundleFacts", "BundleWriter", "Level", "Manifest", "ReferenceLogits"]

Level = Literal["quick", "full"]


class Bundle:
    """An opened, checked bundle; make one with :meth:`open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: Level = "quick") -> Bundle:
        """Open the bundle folder ``path``.

        ``quick`` checks the manifest, that every file is there with its size, the SHA-256 of files up to 16 MiB and the
        sampled hash of larger ones; ``full`` hashes every byte but those of linked checkpoint files, which are always
        checked by header and samples.

        Raises BundleError, one sentence that names the file at fault.
        """
        folder = Path(path)
        _check_folder(folder)
        manifest = read_manifest(folder)
        for name, record in manifest.files.items():
            _check_file(folder, name, record, verify)
        for name, linked in manifest.linked_files.items():
            _check_linked_file(folder, name, linked)
        listed = manifest.files.keys() | manifest.linked_files.keys()
        for name in sorted(RESERVED_NAMES - listed):
            if os.path.lexists(folder / name):
                raise BundleError(
                    f"{folder / name} is not listed in the manifest: it was added later; remove it or export again"
                )
        return cls(folder, manifest)

    @property
    def model_path(self) -> Path:
        """The ONNX graph."""
        return self.path / MODEL_NAME

    @property
    def prefill_path(self) -> Path | None:
        """The graph for many tokens at once; None where the first one is for every step."""
        return self.path / self.manifest.prefill.file if self.manifest.prefill is not None else None

    @property
    def tokenizer_path(self) -> Path:
        """``tokenizer.json``; BundleError when the bundle was made without a tokenizer."""
        return self._require(TOKENIZER)

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """The checkpoint's tokenizer_config.json; empty when it had none."""
        return self._json(TOKENIZER_CONFIG)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, or None when the checkpoint has none."""
        return self.read_text(CHAT_TEMPLATE) if CHAT_TEMPLATE in self.manifest.files else None

    @property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's generation_config.json; empty when it had none.

        Raises BundleError when the file is no JSON object or its ``eos_token_id`` is not one token or several.
        """
        config = self._json(GENERATION_CONFIG)
        found, vocabulary = config.get("eos_token_id"), self.manifest.model.vocab_size
        tokens = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
            raise BundleError(
                f"{self.path / GENERATION_CONFIG}: eos_token_id is no token of the model's {vocabulary}; "
                "export the bundle again"
            )
        return config

    @property
    def accuracy(self) -> dict[str, Any]:
        """The accuracy report, ``references`` included; empty when the export was not verified."""
        return self._json(ACCURACY)

    @property
    def references(self) -> tuple[ReferenceLogits, ...]:
        """Reference logits for an engine's first run on its device; empty when the bundle holds none.

        Raises BundleError when accuracy.json does not hold them as :class:`ReferenceLogits` writes them.
        """
        try:
            return tuple(ReferenceLogits.from_json(fields) for fields in self.accuracy.get("references", []))
        except (KeyError, TypeError) as error:
            raise BundleError(
                f"{self.path / ACCURACY} holds references of an unknown form; export the bundle again"
            ) from error

    def read_text(self, name: str) -> str:
        """The UTF-8 text of a file that the manifest lists; BundleError when it is not listed or not UTF-8."""
        path = self._require(name)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{path} is not UTF-8 text; export the bundle again") from error

    def read_json(self, name: str) -> Any:
        """The JSON value in a file that the manifest lists; BundleError when it is not listed or not JSON."""
        try:
            return json.loads(self.read_text(name))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{self.path / name} is not valid JSON; export the bundle again") from error

    def _require(self, name: str) -> Path:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} holds no {name}; export again from a checkpoint that has one")
        return self.path / name

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self.manifest.files:
            return {}
        value = self.read_json(name)
        if not isinstance(value, dict):
            raise BundleError(f"{self.path / name} is not a JSON object; export the bundle again")
        return value


def _check_folder(folder: Path) -> None:
    try:
        str(folder).encode()
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} does not exist; give the folder that 'qwenforge export' wrote") from error
    except UnicodeEncodeError as error:
        raise BundleError(f"the path {str(folder)!r} is not valid UTF-8; rename the folder") from error
    except OSError as error:
        raise BundleError(
            f"{str(folder)[:200]} cannot be reached ({error.strerror}); give the folder that 'qwenforge export' wrote"
        ) from error
    if not is_folder:
        raise BundleError(f"{folder} is a file, not a bundle folder; give the folder that 'qwenforge export' wrote")


def _check_size(folder: Path, name: str, expected: int) -> Path:
    """The path of a listed file, once it is a regular file inside the folder and of the expected size."""
    path = folder / name
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing; copy the whole bundle or export it again") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be reached ({error.strerror}); check the bundle's permissions") from error
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is not a regular file; export the bundle again")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a symbolic link out of the bundle; replace it by the file itself")
    if status.st_size != expected:
        raise BundleError(
            f"{path} has {status.st_size} bytes, the manifest says {expected}: it is cut short or changed; export again"
        )
    return path


def _check_file(folder: Path, name: str, record: FileRecord, level: Level) -> None:
    path = _check_size(folder, name, record.bytes)
    try:
        if level == "full" or record.bytes <= QUICK_LIMIT:
            same = sha256_file(path) == record.sha256
        else:
            same = sampled_sha256(path) == record.sampled_sha256
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}); check the bundle's permissions and disk"
        ) from error
    if not same:
        raise BundleError(f"{path} does not have the hash in the manifest: it was changed or damaged; export again")


def _check_linked_file(folder: Path, name: str, record: LinkedFileRecord) -> None:
    path = _check_size(folder, name, record.bytes)
    try:
        same = header_sha256(path) == record.header_sha256 and sampled_sha256(path) == record.sampled_sha256
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}); check the bundle's permissions and disk"
        ) from error
    if not same:
        raise BundleError(
            f"{path}, shared with the checkpoint, was changed since the export; restore the checkpoint or export again"
        )
