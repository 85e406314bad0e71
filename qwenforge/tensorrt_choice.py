"""What a TensorRT graph is lowered to, decided by the device, the TensorRT version and what the user asks for.

===================  ==============================================  =================================================
                     attention and cache                             experts
===================  ==============================================  =================================================
TensorRT 11, RTX     native: TensorScatter and TRT_Attention         QwenForgeMoE; the native layer on SM 100, 103
                                                                     and 110 when asked for
TensorRT 10          QwenForgeAttention                              QwenForgeMoE
===================  ==============================================  =================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwenforge.devices import DEVICES, Device, get_device
from qwenforge.errors import UnsupportedError, UserError
from qwenforge.manifest import LoweringRecord

Operator = Literal["native", "plugin"]
WeightsAs = Literal["constants", "inputs"]

TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt-rtx"
TENSORRT_TARGETS = (TENSORRT, TENSORRT_RTX)

RTX_SMS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that an engine of TensorRT for RTX runs on (its documentation, "Compute Capability")."""

LAYOUT_VERSION = 1
"""Of the packed expert weights; plugins/moe/README.md describes it."""

_FIRST_NATIVE = 11


@dataclass(frozen=True)
class TensorRTChoice:
    """How a graph is lowered for TensorRT.

    Attributes:
        target: ``tensorrt`` or ``tensorrt-rtx``.
        device: None for every device of TensorRT for RTX.
        version: the TensorRT version whose parser must take the graph; ``rtx`` for TensorRT for RTX.
        attention, experts: computed by layers of TensorRT (native) or by our plugins.
        weights_as: weight matrices in the engine, or bound to it as inputs.
    """

    target: str
    device: Device | None
    version: str
    attention: Operator
    experts: Operator
    weights_as: WeightsAs

    @property
    def modern_parser(self) -> bool:
        """Whether the parser takes opset 24; otherwise the graph stays within opset 20 and plugins."""
        return self.version == "rtx" or _major(self.version) >= _FIRST_NATIVE

    def record(self, *, routed: bool, mixed: bool) -> LoweringRecord:
        """The manifest's record; ``routed``: there are experts, ``mixed``: some layers needed the attention plugin."""
        return LoweringRecord(
            device=self.device.name if self.device is not None else None,
            sm=self.device.sm if self.device is not None else None,
            tensorrt=self.version,
            attention="mixed" if mixed else self.attention,
            moe=self.experts if routed else "none",
            weights_as=self.weights_as,
            layout_version=LAYOUT_VERSION,
        )


def choose(
    target: str,
    *,
    device: str | None = None,
    version: str | None = None,
    attention: Operator | None = None,
    experts: Operator | None = None,
    weights_as: WeightsAs | None = None,
) -> TensorRTChoice | None:
    """The lowering for ``target``; None for targets that are not TensorRT.

    Args:
        target: as given to ``--target``.
        device: as given to ``--device``: needed for ``tensorrt``, optional for ``tensorrt-rtx``.
        version: the TensorRT version, by default the newest that the device runs.
        attention, experts: by default native attention where the version has it, and the plugin for experts.
        weights_as: by default constants.

    Raises:
        UserError: a choice is missing or does not belong to ``target``.
        UnsupportedError: the device or the version cannot do what is asked for; the message names what can.
    """
    given = {"--device": device, "--tensorrt": version, "--attention": attention, "--experts": experts}
    given["--weights-as"] = weights_as
    if target not in TENSORRT_TARGETS:
        for flag, value in given.items():
            if value is not None:
                others = " (and ort-cuda)" if flag in ("--device", "--attention", "--experts") else ""
                raise UserError(
                    f"{flag} belongs to --target tensorrt and tensorrt-rtx{others}, not to {target}; leave it out."
                )
        return None
    if target == TENSORRT_RTX:
        found = _rtx_device(device, version)
        chosen_version = "rtx"
    else:
        if device is None:
            raise UserError(f"--target tensorrt needs --device, one of {', '.join(DEVICES)}.")
        found = get_device(device)
        chosen_version = found.require_tensorrt(version)
    native = chosen_version == "rtx" or _major(chosen_version) >= _FIRST_NATIVE
    if attention == "native" and not native:
        raise UnsupportedError(
            f"TensorRT {chosen_version} has no attention over a cache in its ONNX parser; use --attention plugin, or "
            f"--tensorrt 11 or newer where the device runs it ({', '.join(found.tensorrt) if found else ''})."
        )
    if experts == "native" and (found is None or not native or chosen_version == "rtx" or not found.native_moe):
        where = f"{found.name} with TensorRT {chosen_version}" if found is not None else "TensorRT for RTX"
        raise UnsupportedError(
            f"{where} has no layer for experts of its own (TensorRT 11 has one for SM 100, 103 and 110); use "
            "--experts plugin."
        )
    return TensorRTChoice(
        target=target,
        device=found,
        version=chosen_version,
        attention=attention or ("native" if native else "plugin"),
        experts=experts or "plugin",
        weights_as=weights_as or "constants",
    )


def needs_plugins(record: LoweringRecord) -> bool:
    """Whether an engine of a graph lowered so needs the plugin library."""
    return record.attention != "native" or record.moe == "plugin"


def _rtx_device(device: str | None, version: str | None) -> Device | None:
    if version is not None:
        raise UserError("--tensorrt belongs to --target tensorrt: TensorRT for RTX is one version; leave it out.")
    if device is None:
        return None
    found = get_device(device)
    if found.sm not in RTX_SMS:
        known = ", ".join(name for name, each in DEVICES.items() if each.sm in RTX_SMS)
        raise UnsupportedError(
            f"TensorRT for RTX does not run on {device} (SM {found.sm}); use --target tensorrt, or one of {known}."
        )
    return found


def _major(version: str) -> int:
    return int(version.split(".")[0])
