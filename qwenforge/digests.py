"""Hashes of a bundle's files: the whole file, a sample of it, or a safetensors header.

The sampled hash makes opening a bundle of many gigabytes fast and still notices most damage: a changed size, a
truncated or zeroed tail, a different model, a bad copy. It is the SHA-256 of the size as 8 little-endian bytes, the
first and the last MiB, and 64 blocks of 64 KiB whose starts divide the file evenly. ``--verify full`` hashes
everything.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

MEBIBYTE = 1024 * 1024
QUICK_LIMIT = 16 * MEBIBYTE
"""Files up to this many bytes are hashed whole even by a quick check."""

_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024


def sha256_file(path: Path) -> str:
    """SHA-256 of the whole file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MEBIBYTE):
            digest.update(piece)
    return digest.hexdigest()


def sampled_sha256(path: Path) -> str:
    """SHA-256 of the file's size and samples, as the module's text defines it; reads at most 6 MiB."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        starts = [(0, MEBIBYTE), (max(size - MEBIBYTE, 0), MEBIBYTE)]
        starts += [(size * index // _SAMPLES, _SAMPLE_BYTES) for index in range(_SAMPLES)]
        for start, length in starts:
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def header_sha256(path: Path) -> str:
    """SHA-256 of a safetensors file's length field and JSON header (of the first MiB where that length is absurd)."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if length > size - 8:
            length = MEBIBYTE
        return hashlib.sha256(prefix + file.read(length)).hexdigest()
