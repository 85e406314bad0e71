"""Where the tensors of a session live: in host memory, or on a device with a copy for Python.

A session binds addresses. A :class:`StepTensor` is a small one that Python writes before a step or reads after it;
a :class:`CacheBuffer` is one layer's keys or values, which Python only moves by rows. On the host both are NumPy arrays
that ONNX Runtime reads and writes in place. On a device they are OrtValues; a step tensor has an array beside it,
copied by ``upload`` and ``download``, which do nothing on the host.

:class:`DeviceMemory` takes the name of the device as ONNX Runtime spells it. With ``cpu`` it keeps separate buffers all
the same, so that everything about it but the GPU can be run on a machine without one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwenforge.runtime import huge_pages

CPU = "cpu"
CUDA = "cuda"

CacheShape = tuple[int, int, int, int]
"""[B, Hk, M, D]."""


class StepTensor(Protocol):
    """A tensor of one step; ``array`` is what Python writes or reads."""

    array: NDArray[Any]
    device: str
    device_index: int

    @property
    def address(self) -> int:
        """Where the session finds it; the same as long as the tensor lives."""

    def upload(self) -> None:
        """Make what was written into ``array`` visible to the session."""

    def download(self) -> None:
        """Make what the session wrote visible in ``array``."""


class CacheBuffer(Protocol):
    """One cache tensor [B, Hk, M, D], zero-filled at first; ``row_bytes`` is what one of its B rows takes."""

    device: str
    device_index: int
    row_bytes: int

    @property
    def address(self) -> int:
        """Of row 0; row r is ``r * row_bytes`` behind it."""

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy at least the first ``length`` tokens of row ``source`` over row ``target``."""

    def read(self) -> NDArray[Any]:
        """The whole buffer as an array: the buffer itself on the host, a copy of it from a device."""


class Memory(Protocol):
    """Makes the tensors of a session."""

    def step_tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> StepTensor:
        """A tensor of one step; its ``array`` is filled with zeros, a device's memory not before the first upload."""

    def cache_buffers(self, shapes: Sequence[CacheShape], dtype: np.dtype[Any]) -> list[CacheBuffer]:
        """Zero-filled cache tensors."""


class HostMemory:
    """NumPy arrays; the operating system commits a (huge) page when it is first written."""

    def step_tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> StepTensor:
        """See :class:`Memory`."""
        return _HostTensor(shape, dtype)

    def cache_buffers(self, shapes: Sequence[CacheShape], dtype: np.dtype[Any]) -> list[CacheBuffer]:
        """See :class:`Memory`."""
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        # Together: one tensor of a small model is less than a huge page.
        parts = np.split(huge_pages.zeros(sum(sizes)), np.cumsum(sizes)[:-1])
        return [_HostCache(part.view(dtype).reshape(shape)) for part, shape in zip(parts, shapes, strict=True)]


class _HostTensor:
    device, device_index = CPU, 0

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.array: NDArray[Any] = np.zeros(shape, dtype)

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def upload(self) -> None:
        return None

    def download(self) -> None:
        return None


class _HostCache:
    device, device_index = CPU, 0

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        self.row_bytes = math.prod(array.shape[1:]) * array.itemsize

    @property
    def address(self) -> int:
        return self._array.ctypes.data

    def copy_row(self, source: int, target: int, length: int) -> None:
        self._array[target, :, :length] = self._array[source, :, :length]

    def read(self) -> NDArray[Any]:
        return self._array


class DeviceMemory:
    """OrtValues on one device.

    Args:
        device: as ONNX Runtime spells it, such as ``cuda``.
        device_index: which one of them.
        providers: what a session on that device is made with; rows are copied by a session of one Identity node,
            because ONNX Runtime's Python interface copies whole OrtValues only.
    """

    def __init__(self, device: str, device_index: int, providers: list[Any]) -> None:
        self._device, self._device_index = device, device_index
        self._copier = _Copier(device, device_index, providers)

    @property
    def providers(self) -> list[str]:
        """Those that ONNX Runtime did make a session with; it goes on without one that does not load."""
        return self._copier.providers

    def step_tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> StepTensor:
        """See :class:`Memory`."""
        return _DeviceTensor(shape, dtype, self._device, self._device_index)

    def cache_buffers(self, shapes: Sequence[CacheShape], dtype: np.dtype[Any]) -> list[CacheBuffer]:
        """See :class:`Memory`."""
        return [_DeviceCache(shape, dtype, self._device, self._device_index, self._copier) for shape in shapes]


class _DeviceTensor:
    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: str, device_index: int) -> None:
        self.device, self.device_index = device, device_index
        self.array: NDArray[Any] = np.zeros(shape, dtype)
        self._value = _allocate(shape, dtype, device, device_index)

    @property
    def address(self) -> int:
        return int(self._value.data_ptr())

    def upload(self) -> None:
        self._value.update_inplace(self.array)

    def download(self) -> None:
        np.copyto(self.array, self._value.numpy())


class _DeviceCache:
    """Bytes for ONNX Runtime, whatever their type: its Python interface has no arrays of bfloat16."""

    def __init__(
        self,
        shape: CacheShape,
        dtype: np.dtype[Any],
        device: str,
        device_index: int,
        copier: _Copier,
    ) -> None:
        self.device, self.device_index = device, device_index
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._shape, self._dtype, self._copier = shape, dtype, copier
        self._value = _allocate((shape[0] * self.row_bytes,), np.dtype(np.uint8), device, device_index)
        # What is not valid is never seen, but 0 times a NaN that memory happens to hold would be.
        copier.fill_with_zeros(self.address, shape[0], self.row_bytes)

    @property
    def address(self) -> int:
        return int(self._value.data_ptr())

    def copy_row(self, source: int, target: int, length: int) -> None:
        # The tokens of a row lie in Hk places: one copy of all of it is less work than Hk small ones.
        start = self.address
        self._copier.copy(start + source * self.row_bytes, start + target * self.row_bytes, self.row_bytes)

    def read(self) -> NDArray[Any]:
        return np.array(self._value.numpy()).view(self._dtype).reshape(self._shape)


class _Copier:
    """Copies bytes on a device, from one address to another."""

    def __init__(self, device: str, device_index: int, providers: list[Any]) -> None:
        import onnxruntime
        from onnx import TensorProto, helper

        self._device, self._device_index = device, device_index
        values = [helper.make_tensor_value_info(name, TensorProto.UINT8, ["bytes"]) for name in ("source", "target")]
        graph = helper.make_graph(
            [helper.make_node("Identity", ["source"], ["target"])], "copy", values[:1], values[1:]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)

    @property
    def providers(self) -> list[str]:
        return list(self._session.get_providers())

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy ``count`` bytes; the two ranges do not overlap."""
        binding = self._session.io_binding()
        place = (self._device, self._device_index, np.uint8, [count])
        binding.bind_input("source", *place, source)
        binding.bind_output("target", *place, target)
        self._session.run_with_iobinding(binding)

    def fill_with_zeros(self, address: int, rows: int, row_bytes: int) -> None:
        """Set ``rows`` times ``row_bytes`` bytes from ``address`` on to zero."""
        import onnxruntime

        zeros = np.zeros(row_bytes, np.uint8)
        source = onnxruntime.OrtValue.ortvalue_from_numpy(zeros, self._device, self._device_index)
        for row in range(rows):
            self.copy(int(source.data_ptr()), address + row * row_bytes, row_bytes)


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any], device: str, device_index: int) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype.type, device, device_index)
