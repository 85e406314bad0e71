"""Activations on disk: one file a value, its calibration rows one after the other, so that few are in memory.

Files are read and written, never mapped: a mapping's pages would count as this process's memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.errors import UserError

Array = npt.NDArray[Any]


class SpilledValue:
    """A value of every calibration row, written in order, then read as often as needed.

    Args:
        path: the file; one that exists is written anew by the first :meth:`append`, or read when ``shape`` is given.
        shape, dtype: of one row's value, when the file is complete.
    """

    def __init__(self, path: Path, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self._file: Any = None

    def append(self, value: Array) -> None:
        """Write the next row's value; all rows' shapes are the same.

        Raises:
            UserError: the disk is full.
        """
        if self._file is None:
            self.shape, self.dtype = value.shape, value.dtype.str
            self._file = self.path.open("wb")
        if value.shape != self.shape or value.dtype.str != self.dtype:
            raise ValueError(f"{self.path.name}: a row of {value.shape} after rows of {self.shape}")
        try:
            self._file.write(np.ascontiguousarray(value).data)
        except OSError as error:
            raise _disk(self.path, error) from error

    def close(self) -> None:
        """End writing: what was written is on the disk afterwards."""
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            except OSError as error:
                raise _disk(self.path, error) from error
            self._file = None

    def row(self, index: int) -> Array:
        """The value of calibration row ``index``."""
        assert self.shape is not None and self.dtype is not None
        count = int(np.prod(self.shape))
        kind = np.dtype(self.dtype)
        with self.path.open("rb") as file:
            found = np.fromfile(file, kind, count, offset=index * count * kind.itemsize)
        if found.size != count:
            raise UserError(f"{self.path} is shorter than it was written: remove the work folder and calibrate again")
        return found.reshape(self.shape)

    def tokens(self, rows: int) -> Iterator[Array]:
        """Row by row as [T, K], K the last axis."""
        for index in range(rows):
            value = self.row(index)
            yield value.reshape(-1, value.shape[-1])

    def remove(self) -> None:
        """Delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _disk(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write activations to {path}: {error.strerror or error}; free space or use another work folder"
    )
