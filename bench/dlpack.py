"""Tensors that speak DLPack, read where they are: address, shape and type, with neither a copy nor their framework."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ELEMENTS = {(2, 16): "float16", (4, 16): "bfloat16", (2, 32): "float32", (0, 32): "int32", (0, 8): "int8"}


class KernelError(Exception):
    """A tensor does not fit, or the kernels refused the call."""


# DLPack's structures (dlpack.h, version 0.8): what a capsule named "dltensor" points to.
class _DLDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Tensor:
    """What DLPack says of a tensor; ``owner`` keeps its memory alive."""

    address: int
    shape: tuple[int, ...]
    element: str
    owner: Any

    @staticmethod
    def of(name: str, value: Any) -> Tensor:
        """Read ``value.__dlpack__()``.

        Raises:
            KernelError: it speaks no DLPack, is of an unknown type, or does not lie in memory row by row.
        """
        if not hasattr(value, "__dlpack__"):
            raise KernelError(f"{name} is a {type(value).__name__}, which has no __dlpack__")
        capsule = value.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        # The capsule stays unused, so that it frees its structure itself, after `value`'s memory was noted here.
        tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
        shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
        element = _ELEMENTS.get((tensor.dtype.code, tensor.dtype.bits))
        if element is None or tensor.dtype.lanes != 1:
            raise KernelError(f"{name} is of a type that the kernels do not know")
        step = 1
        for axis in reversed(range(tensor.ndim)):
            if tensor.strides and shape[axis] > 1 and tensor.strides[axis] != step:
                raise KernelError(f"{name} is not contiguous: call .contiguous() on it")
            step *= shape[axis]
        return Tensor((tensor.data or 0) + tensor.byte_offset, shape, element, value)

    def require(self, name: str, shape: Sequence[int], element: str) -> None:
        """Raise KernelError unless the tensor is of that shape and type."""
        if self.shape != tuple(shape) or self.element != element:
            raise KernelError(f"{name} is {self.element} {list(self.shape)}, not {element} {list(shape)}")
