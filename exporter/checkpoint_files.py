"""Finding a checkpoint's files: which weights files there are, and that every one lies where it may."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qwenforge.errors import CheckpointError

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Largest JSON file read; the index of a checkpoint with 100 000 tensors has 10 MB."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def check_folder(folder: Path) -> None:
    """Raise CheckpointError, saying what to give instead, unless ``folder`` can be a checkpoint."""
    try:
        str(folder).encode()
        folder.stat()
    except FileNotFoundError:
        pass  # answered below
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the path {str(folder)!r} is not valid UTF-8: rename the folder") from error
    except OSError as error:
        raise CheckpointError(
            f"{str(folder)[:200]} cannot be reached ({error.strerror or error}): give the path of a Hugging Face "
            "checkpoint folder"
        ) from error
    if folder.suffix == ".gguf":
        raise CheckpointError(f"{folder} is a GGUF file: give the original Hugging Face checkpoint folder instead")
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist: give the path of a Hugging Face checkpoint folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give the checkpoint folder that holds it")
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be listed ({error.strerror or error}): check its permissions"
        ) from error
    if not names:
        raise CheckpointError(f"{folder} is empty: download the checkpoint into it")
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise CheckpointError(f"{folder} holds a LoRA adapter: merge it into its base model and save that first")
        if any(name.endswith(".gguf") for name in names):
            raise CheckpointError(f"{folder} holds GGUF files: give the original Hugging Face checkpoint instead")
        raise CheckpointError(f"{folder} has no config.json: give a Hugging Face checkpoint folder")


def inside(folder: Path, name: str, *, named_by: str) -> Path:
    """The real path of file ``name`` of the checkpoint.

    A link may point within the folder, or into the ``blobs`` folder of the Hugging Face cache that the folder is a
    snapshot of (that is how the cache stores every file).

    Raises:
        CheckpointError: The file is missing, or the name or a link leads elsewhere; ``named_by`` opens the sentence.
    """
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{named_by} names {name!r}, outside the checkpoint folder: do not trust this checkpoint")
    path = folder / name
    try:
        real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        is_file = real.is_file()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{named_by} names {name[:80]!r}, which no file can be called: download it again"
        ) from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{named_by} names {name!r}, a link to {real} outside the checkpoint folder: copy the file into the folder"
        )
    if not is_file:
        raise CheckpointError(f"{named_by} names {name!r}, which is missing in {folder}: download it")
    return real


def weight_files(folder: Path) -> tuple[dict[str, Path], dict[str, str] | None]:
    """The weights files by name, and the index (tensor -> file name) when the checkpoint is sharded.

    Raises:
        CheckpointError: There is no safetensors checkpoint, or its index is damaged or names files that are missing
            or outside the folder.
    """
    if (folder / SINGLE_FILE).exists() or (folder / SINGLE_FILE).is_symlink():
        return {SINGLE_FILE: inside(folder, SINGLE_FILE, named_by=str(folder))}, None
    if not (folder / INDEX_FILE).exists():
        raise CheckpointError(_what_is_there_instead(folder))
    index = folder / INDEX_FILE
    weight_map = _read_index(inside(folder, INDEX_FILE, named_by=str(folder)), index)
    files = {name: inside(folder, name, named_by=str(index)) for name in dict.fromkeys(weight_map.values())}
    return files, weight_map


def read_json_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in ``path``; raises CheckpointError when there is none, or an object lists a name twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise CheckpointError(f"{path} lists {name[:80]!r} twice: keep one of them")
            fields[name] = value
        return fields

    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes, too large for it: download it again")
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} must hold a JSON object: download it again")
    return parsed


def _read_index(real: Path, index: Path) -> dict[str, str]:
    weight_map = read_json_object(real).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map': download it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index} gives tensor {tensor!r} the file {file!r}: download it again")
    return weight_map


def _what_is_there_instead(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if "adapter_model.safetensors" in names:
        return f"{folder} holds a LoRA adapter: merge it into its base model and save that first"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            f"{folder} holds PyTorch pickle weights only, which are not read because they can run code: load it with "
            "transformers and call save_pretrained to get safetensors"
        )
    if any(name.endswith(".gguf") for name in names):
        return f"{folder} holds GGUF files: give the original Hugging Face checkpoint instead"
    if any(name.endswith(".safetensors") for name in names):
        return f"{folder} has safetensors files but neither {SINGLE_FILE} nor {INDEX_FILE}: download the index too"
    return f"{folder} has no {SINGLE_FILE}: download the weights"
