"""The NVIDIA GPU of this machine, asked of the driver itself: nvidia-smi is not on every Jetson."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76
"""CUdevice_attribute's numbers of the compute capability."""


@dataclass(frozen=True)
class LocalGpu:
    """The first visible GPU: name, compute capability (90), bytes of memory and the driver's CUDA version (13.0)."""

    name: str
    sm: int
    memory_bytes: int
    driver: str


def local_gpu() -> LocalGpu | None:
    """The GPU that a builder would use; None where there is no driver or no visible GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor, version = (ctypes.c_int() for _ in range(4))
    size, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    calls = (
        (driver.cuInit, 0),
        (driver.cuDeviceGet, ctypes.byref(device), 0),
        (driver.cuDeviceGetName, name, len(name), device),
        (driver.cuDeviceGetAttribute, ctypes.byref(major), _MAJOR, device),
        (driver.cuDeviceGetAttribute, ctypes.byref(minor), _MINOR, device),
        (driver.cuDeviceTotalMem_v2, ctypes.byref(size), device),
        (driver.cuDriverGetVersion, ctypes.byref(version)),
    )
    for function, *arguments in calls:
        if function(*arguments) != 0:
            return None
    return LocalGpu(
        name=name.value.decode(errors="replace"),
        sm=10 * major.value + minor.value,
        memory_bytes=size.value,
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )
