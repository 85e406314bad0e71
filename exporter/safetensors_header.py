"""Reading and distrusting the header of a ``.safetensors`` file (format: huggingface.co/docs/safetensors).

The file is eight bytes of little-endian header length, a JSON header and the tensors' bytes. Everything the header
claims is checked against the file before anyone maps a tensor; no tensor bytes are read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenforge.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 8
_MAX_NAME = 1000
_AGAIN = "the file is damaged, download it again"
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's place in a file; ``offset`` and ``length`` are in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a file holds, checked.

    Attributes:
        path: The file.
        size: Its size in bytes.
        tensors: Name -> where and what.
        digest: SHA-256 of the header's bytes.
    """

    path: Path
    size: int
    tensors: Mapping[str, StoredTensor]
    digest: str


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of ``path``.

    Raises:
        CheckpointError: The file is missing, is another format (LFS pointer, pickle, GGUF), or its header does not
            describe the file: absurd length, bad JSON, repeated names, offsets beyond the file, wrong byte counts,
            overlaps or bytes that belong to no tensor.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(64)
            _refuse_other_formats(path, start, size)
            length = int.from_bytes(start[:8], "little")
            if length > _MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(
                    f"{path} claims a header of {length} bytes but has {size} bytes in all: it is truncated or no "
                    "safetensors file, download it again"
                )
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): check the file") from error
    tensors = _tensors(path, _parse(path, header), 8 + length, size)
    _check_layout(path, tensors, 8 + length, size)
    return SafetensorsHeader(
        path, size, {tensor.name: tensor for tensor in tensors}, hashlib.sha256(header).hexdigest()
    )


def _refuse_other_formats(path: Path, start: bytes, size: int) -> None:
    if start[8:9] == b"{":
        return  # a header of 640 bytes begins like a pickle
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' or download the file")
    if start.startswith(b"GGUF"):
        raise CheckpointError(f"{path} is a GGUF file: give the original safetensors checkpoint instead")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise CheckpointError(f"{path} is a PyTorch pickle, not safetensors: convert it with save_pretrained first")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page, not the weights: download the file itself")
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file: download it again")


def _parse(path: Path, header: bytes) -> Mapping[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header lists {_short(repeated)} twice: {_AGAIN}")
        return dict(pairs)

    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}): {_AGAIN}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object: {_AGAIN}")
    return parsed


def _tensors(path: Path, header: Mapping[str, Any], data_start: int, size: int) -> list[StoredTensor]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the header's __metadata__ is not a table of texts: {_AGAIN}")
    return [_tensor(path, name, entry, data_start, size) for name, entry in header.items() if name != "__metadata__"]


def _tensor(path: Path, name: str, entry: Any, data_start: int, size: int) -> StoredTensor:
    where = f"{path}: tensor {_short(name)}"
    if len(name) > _MAX_NAME:
        raise CheckpointError(f"{where} has a name of {len(name)} characters: {_AGAIN}")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets in the header: {_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} has the unknown dtype {_short(dtype)}: {_AGAIN}")
    if not _is_naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has the impossible shape {_short(shape)}: {_AGAIN}")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has impossible data offsets {_short(offsets)}: {_AGAIN}")
    begin, end = offsets
    if data_start + end > size:
        raise CheckpointError(
            f"{where} should end at byte {data_start + end} but the file has {size} bytes: it is truncated, download "
            "it again"
        )
    needed = (math.prod(shape) * _BITS[dtype] + 7) // 8
    if end - begin != needed:
        raise CheckpointError(
            f"{where} of shape {shape} and dtype {dtype} needs {needed} bytes but the header gives it {end - begin}: "
            f"{_AGAIN}"
        )
    return StoredTensor(name, dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """The tensors must tile the data section: neither overlaps nor bytes of nobody."""
    position, previous = data_start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.length)):
        if tensor.offset < position:
            raise CheckpointError(f"{path}: tensor {tensor.name!r} overlaps {previous!r}: {_AGAIN}")
        if tensor.offset > position:
            raise CheckpointError(
                f"{path}: {tensor.offset - position} bytes before tensor {tensor.name!r} belong to no tensor: {_AGAIN}"
            )
        position, previous = tensor.offset + tensor.length, tensor.name
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes at the end belong to no tensor: {_AGAIN}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62 for item in value
    )
