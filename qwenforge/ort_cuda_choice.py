"""What an ``ort-cuda`` graph is made of, decided by the GPU and by what the user asks for.

=========  =============================================  ============================================================
           native                                         plugin
=========  =============================================  ============================================================
attention  ``com.microsoft::GroupQueryAttention``         ``qwenforge::QwenForgeAttention``; decode is captured as a
                                                          CUDA graph
experts    ``com.microsoft::MoE``                         ``qwenforge::QwenForgeMoE``, the shared expert in it
=========  =============================================  ============================================================

Ours are custom ops of libqwenforge_ort.so. ONNX Runtime's attention is the default because it has been used on GPUs for
years and ours has not been timed there. Our experts are the default because ONNX Runtime's op leaves the shared expert
to six more nodes a layer and picks its kernels by a measurement of its own at the first call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qwenforge.devices import Device, get_device
from qwenforge.errors import UserError
from qwenforge.manifest import OrtCudaRecord
from qwenforge.tensorrt_choice import LAYOUT_VERSION, Operator

ORT_CUDA = "ort-cuda"


@dataclass(frozen=True)
class Preference:
    """Who computes what where the user does not say; ``basis`` says what that rests on."""

    attention: Operator
    experts: Operator
    basis: str


_ESTIMATE = "estimate, not measured"

PREFERENCES: Mapping[int, Preference] = MappingProxyType(
    {
        80: Preference("native", "plugin", _ESTIMATE),
        86: Preference("native", "plugin", _ESTIMATE),
        87: Preference("native", "plugin", _ESTIMATE),
        89: Preference("native", "plugin", _ESTIMATE),
        90: Preference("native", "plugin", _ESTIMATE),
        100: Preference("native", "plugin", _ESTIMATE),
        110: Preference("native", "plugin", _ESTIMATE),
        120: Preference("native", "plugin", _ESTIMATE),
    }
)
"""By compute capability. A line that was measured names its file in bench/results/ as its basis."""

ANY_GPU = Preference("native", "plugin", _ESTIMATE)
"""Where no device is given."""


@dataclass(frozen=True)
class OrtCudaChoice:
    """How a graph is lowered for ONNX Runtime's CUDA execution provider.

    Attributes:
        device: the GPU whose preferences were asked for; None for any. The graph runs on every GPU either way.
        attention, experts: computed by ONNX Runtime's operators (native) or by our custom ops (plugin).
        basis: what the choice rests on.
    """

    device: Device | None
    attention: Operator
    experts: Operator
    basis: str

    @property
    def target(self) -> str:
        """The target's name."""
        return ORT_CUDA

    def record(self, *, routed: bool) -> OrtCudaRecord:
        """The manifest's record; ``routed``: there are experts."""
        moe: Literal["none", "native", "plugin"] = self.experts if routed else "none"
        return OrtCudaRecord(
            device=self.device.name if self.device is not None else None,
            sm=self.device.sm if self.device is not None else None,
            attention=self.attention,
            moe=moe,
            layout_version=LAYOUT_VERSION,
            basis=self.basis,
        )


def choose(
    *, device: str | None = None, attention: Operator | None = None, experts: Operator | None = None
) -> OrtCudaChoice:
    """The lowering for ``ort-cuda``; what is not given comes from :data:`PREFERENCES`.

    Raises:
        UnsupportedError: the device is unknown.
    """
    found = get_device(device) if device is not None else None
    preference = PREFERENCES.get(found.sm, ANY_GPU) if found is not None else ANY_GPU
    asked = attention is not None and experts is not None
    return OrtCudaChoice(
        device=found,
        attention=attention or preference.attention,
        experts=experts or preference.experts,
        basis="asked for" if asked else preference.basis,
    )


def needs_library(record: OrtCudaRecord) -> bool:
    """Whether a graph lowered so needs libqwenforge_ort.so."""
    return record.attention == "plugin" or record.moe == "plugin"


def captures_decode(record: OrtCudaRecord) -> bool:
    """Whether decode steps of a graph lowered so are captured as CUDA graphs.

    Not with ``GroupQueryAttention``. It reads ``total_sequence_length`` in host memory when it is launched and derives
    its split of the keys from it, so that a captured launch would repeat the first step's; and ONNX Runtime puts the
    arithmetic of that number on the CPU, with a copy to the device behind it, which it refuses to capture.
    """
    return record.attention == "plugin"


def refuse_tensorrt_flags(**given: object) -> None:
    """Refuse flags that only a TensorRT lowering has; ``given``: value by flag, without the dashes.

    Raises:
        UserError: one of them was given.
    """
    for flag, value in given.items():
        if value is not None:
            raise UserError(
                f"--{flag.replace('_', '-')} belongs to --target tensorrt, not to {ORT_CUDA}; leave it out."
            )
