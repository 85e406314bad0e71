"""NVIDIA devices by name: what each one has, and what it cannot do.

The figures, their sources and how a rate follows from them are in docs/targets.md. Rates are dense (no 2:4 sparsity),
accumulated in fp32 where the hardware tells the difference, at the boost clock: upper limits, not promises.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qwenforge.errors import UnsupportedError

Family = Literal["datacenter", "geforce", "jetson"]

GB = 10**9
TERA = 10**12

PRECISIONS = ("fp16", "bf16", "int8", "fp8", "int4")
"""Precisions of weights; int4 is for weights only, which are multiplied in fp16 or bf16."""

_DATACENTER_TENSORRT = ("10.3", "10.13", "10.16", "11.4")
_FIRST_FP8_SM = 89
_NATIVE_MOE_SMS = frozenset({100, 103, 110})


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: as given to ``--device``.
        product: the variant that the figures are of.
        family: decides which TensorRT packages there are.
        sm: compute capability without the dot, such as 90.
        memory_bytes: of one device.
        unified_memory: CPU and GPU share the memory, so that the system takes part of it.
        bandwidth: of the memory, in bytes a second.
        rates: dense operations a second by the precision of the multiplied numbers.
        tensorrt: the TensorRT versions that run on it, oldest first.
    """

    name: str
    product: str
    family: Family
    sm: int
    memory_bytes: int
    bandwidth: float
    rates: Mapping[str, float]
    tensorrt: tuple[str, ...]
    unified_memory: bool = False

    @property
    def precisions(self) -> tuple[str, ...]:
        """The weight precisions that the device can use."""
        return tuple(precision for precision in PRECISIONS if precision == "int4" or precision in self.rates)

    @property
    def native_moe(self) -> bool:
        """Whether TensorRT 11 has its own mixture-of-experts layer for the device."""
        return self.sm in _NATIVE_MOE_SMS

    def require_precision(self, precision: str) -> None:
        """Raise UnsupportedError, with the alternatives, unless the device can use ``precision``."""
        if precision in self.precisions:
            return
        others = ", ".join(self.precisions)
        if precision == "fp8" and self.sm < _FIRST_FP8_SM:
            raise UnsupportedError(
                f"{self.name} (SM {self.sm}) has no FP8 arithmetic, which starts with SM {_FIRST_FP8_SM}; choose int8 "
                f"for the same size, or another of {others}."
            )
        raise UnsupportedError(f"{self.name} does not support {precision}; choose one of {others}.")

    def require_tensorrt(self, version: str | None) -> str:
        """The TensorRT version to lower for, as major.minor: of ``version``, or the newest that the device runs.

        A Jetson runs the versions that its JetPack releases bring; other devices run every release from the oldest
        one of the table on.

        Raises:
            UnsupportedError: the device does not run ``version``, or it is no version.
        """
        if version is None:
            return self.tensorrt[-1]
        found = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*", version)
        if found is None:
            raise UnsupportedError(f"{version!r} is not a TensorRT version; choose one of {', '.join(self.tensorrt)}.")
        short = f"{found[1]}.{found[2]}"
        between = self.family != "jetson" and _numbers(self.tensorrt[0]) <= _numbers(short)
        if short in self.tensorrt or (between and int(found[1]) <= _numbers(self.tensorrt[-1])[0]):
            return short
        others = "" if self.family == "jetson" else " or a release between them"
        raise UnsupportedError(
            f"TensorRT {version} is not known to run on {self.name}; choose one of {', '.join(self.tensorrt)}{others}."
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def _rates(fp16: float, *, int8: float, fp8: float | None = None) -> Mapping[str, float]:
    rates = {"fp16": fp16 * TERA, "bf16": fp16 * TERA, "int8": int8 * TERA}
    if fp8 is not None:
        rates["fp8"] = fp8 * TERA
    return MappingProxyType(rates)


_JETPACK_6_AND_7_2 = ("10.3", "10.16")
_DEVICES = (
    Device("a100", "A100 SXM 80 GB", "datacenter", 80, 80 * GB, 2.039e12, _rates(312, int8=624), _DATACENTER_TENSORRT),
    Device(
        "h100",
        "H100 SXM 80 GB",
        "datacenter",
        90,
        80 * GB,
        3.35e12,
        _rates(989, int8=1979, fp8=1979),
        _DATACENTER_TENSORRT,
    ),
    Device(
        "h200",
        "H200 SXM 141 GB",
        "datacenter",
        90,
        141 * GB,
        4.8e12,
        _rates(989, int8=1979, fp8=1979),
        _DATACENTER_TENSORRT,
    ),
    Device(
        "b200",
        "B200 of an HGX B200",
        "datacenter",
        100,
        180 * GB,
        8e12,
        _rates(2250, int8=4500, fp8=4500),
        ("10.13", "10.16", "11.4"),
    ),
    Device("l4", "L4", "datacenter", 89, 24 * GB, 300e9, _rates(121, int8=242.5, fp8=242.5), _DATACENTER_TENSORRT),
    Device("l40s", "L40S", "datacenter", 89, 48 * GB, 864e9, _rates(362, int8=733, fp8=733), _DATACENTER_TENSORRT),
    Device(
        "rtx-4090",
        "GeForce RTX 4090",
        "geforce",
        89,
        24 * GB,
        1.008e12,
        _rates(165.2, int8=660.6, fp8=330.3),
        _DATACENTER_TENSORRT,
    ),
    Device(
        "rtx-5090",
        "GeForce RTX 5090",
        "geforce",
        120,
        32 * GB,
        1.792e12,
        _rates(209.5, int8=838, fp8=419),
        ("10.13", "10.16", "11.4"),
    ),
    Device(
        "jetson-orin-nano",
        "Jetson Orin Nano 8 GB, MAXN SUPER",
        "jetson",
        87,
        8 * GB,
        102e9,
        _rates(16.7, int8=33.4),
        _JETPACK_6_AND_7_2,
        True,
    ),
    Device(
        "jetson-orin-nx",
        "Jetson Orin NX 16 GB, MAXN SUPER",
        "jetson",
        87,
        16 * GB,
        102e9,
        _rates(19.2, int8=38.4),
        _JETPACK_6_AND_7_2,
        True,
    ),
    Device(
        "jetson-orin-agx",
        "Jetson AGX Orin 64 GB",
        "jetson",
        87,
        64 * GB,
        204.8e9,
        _rates(42.6, int8=85.2),
        ("10.3", "10.16", "11.4"),
        True,
    ),
    Device(
        "jetson-thor",
        "Jetson AGX Thor, T5000 128 GB",
        "jetson",
        110,
        128 * GB,
        273e9,
        _rates(258, int8=517, fp8=517),
        ("10.13", "10.16", "11.4"),
        True,
    ),
)

DEVICES: Mapping[str, Device] = MappingProxyType({device.name: device for device in _DEVICES})
"""Every known device by name."""


def get_device(name: str) -> Device:
    """The device called ``name``; raises UnsupportedError, with the names there are, when there is none."""
    if name in DEVICES:
        return DEVICES[name]
    near = difflib.get_close_matches(name, DEVICES, n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    raise UnsupportedError(f"unknown device {name!r}{guess}; known are {', '.join(DEVICES)}.")
