"""One data file being written: aligned, hashed as it grows, identical tensors stored once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import IO

import onnx_ir as ir

from qwenforge.exporter.weights import chunks, plan_key

PAGE_BYTES = 4096
"""Alignment of large tensors, so that they can be mapped."""

LINE_BYTES = 64
"""Alignment of small tensors: a cache line, and enough for any vector load."""

PAGE_ALIGNED_FROM = 64 * 1024

_HEAD_BYTES = 4096
_COMPARE_BYTES = 1 << 20

Progress = Callable[[int, int, str], None]
"""Called as ``progress(bytes_done, bytes_total, initializer_name)`` after each piece."""


class DataWriter:
    """Appends tensors to an open, readable and writable binary file.

    Attributes:
        location: The file's final name, for the model to refer to.
        size: Bytes written.
        duplicate_bytes: Bytes saved by finding a tensor already there.
    """

    def __init__(self, file: IO[bytes], path: Path, total: int, progress: Progress | None) -> None:
        """Write to ``file``, which will be called ``path``; ``total`` bytes are to come."""
        self.location = path.name
        self.size = 0
        self.duplicate_bytes = 0
        self._file = file
        self._hash = hashlib.sha256()
        self._done = 0
        self._total = total
        self._progress = progress
        self._offset_of_plan: dict[Hashable, int] = {}
        self._offsets_of_head: dict[tuple[int, bytes], list[int]] = {}

    @property
    def sha256(self) -> str:
        """Hash of the file so far, in hexadecimal."""
        return self._hash.hexdigest()

    def write(self, tensor: ir.TensorProtocol, name: str) -> int:
        """Make the file hold ``tensor`` and return its offset."""
        key = plan_key(tensor)
        if key in self._offset_of_plan:
            self.duplicate_bytes += tensor.nbytes
            self._report(tensor.nbytes, name)
        else:
            self._offset_of_plan[key] = self._append(tensor, name)
        return self._offset_of_plan[key]

    def _append(self, tensor: ir.TensorProtocol, name: str) -> int:
        size_before, hash_before = self.size, self._hash.copy()
        alignment = PAGE_BYTES if tensor.nbytes >= PAGE_ALIGNED_FROM else LINE_BYTES
        self._put(bytes(-self.size % alignment))
        offset, head = self.size, b""
        for chunk in chunks(tensor):
            head = head or bytes(chunk[:_HEAD_BYTES])
            self._put(chunk)
            self._report(len(chunk), name)
        if self.size - offset != tensor.nbytes:
            raise AssertionError(f"{name}: {self.size - offset} bytes written for {tensor.nbytes}")
        twins = self._offsets_of_head.setdefault((tensor.nbytes, head), [])
        for twin in twins:
            if self._same_bytes(twin, offset, tensor.nbytes):
                self._file.seek(size_before)
                self._file.truncate()
                self.size, self._hash = size_before, hash_before
                self.duplicate_bytes += tensor.nbytes
                return twin
        twins.append(offset)
        return offset

    def _put(self, data: bytes | memoryview) -> None:
        # Hashing takes as long as writing; both let other threads run.
        hashing = threading.Thread(target=self._hash.update, args=(data,))
        hashing.start()
        try:
            self._file.write(data)
        finally:
            hashing.join()
        self.size += len(data)

    def _same_bytes(self, first: int, second: int, length: int) -> bool:
        try:
            for start in range(0, length, _COMPARE_BYTES):
                count = min(_COMPARE_BYTES, length - start)
                self._file.seek(first + start)
                piece = self._file.read(count)
                self._file.seek(second + start)
                if piece != self._file.read(count):
                    return False
            return True
        finally:
            self._file.seek(self.size)

    def _report(self, count: int, name: str) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total, name)
