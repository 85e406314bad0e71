"""What a build can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwenforge.engine.tensorrt.profiles import Sizes
from qwenforge.errors import UnsupportedError, UserError
from qwenforge.tensorrt_choice import TENSORRT_RTX

HardwareCompatibility = Literal["none", "ampere+", "same-cc"]


@dataclass(frozen=True)
class BuildOptions:
    """The options of ``qwenforge build``.

    Attributes:
        target: None for the one that the bundle was exported for, which it has to be otherwise.
        device: None for the one that the bundle was exported for.
        sizes: what the profiles span.
        workspace_bytes: largest workspace of a layer; None leaves it to TensorRT.
        optimization_level: 0 (fast build) to 5; None for TensorRT's default.
        timing_cache: file of timings to use and add to; None for none, an empty path for the device's own.
        version_compatible: loadable by later TensorRT versions.
        hardware_compatible: for every GPU from Ampere on, or of the same compute capability.
        weight_streaming: weights may stay in host memory when it runs.
        strip_weights: leave the weights out of the engine; it is refitted from the bundle's graph when it is loaded.
        plugin_library: the library to use; None to look for it.
        rebuild: build even where the bundle holds just this engine.
        check_memory: refuse a build for which memory seems too small.
    """

    target: str | None = None
    device: str | None = None
    sizes: Sizes = field(default_factory=Sizes)
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = Path()
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility = "none"
    weight_streaming: bool = False
    strip_weights: bool = False
    plugin_library: Path | None = None
    rebuild: bool = False
    check_memory: bool = True

    def check(self, target: str) -> None:
        """Refuse what ``target`` cannot do, or what does not go together.

        Raises:
            UserError: the message says what to leave out.
        """
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UserError(f"--optimization-level is 0 to 5, not {self.optimization_level}.")
        if self.version_compatible and self.hardware_compatible == "same-cc":
            raise UserError("--version-compatible does not go with --hardware-compatible same-cc; leave one out.")
        if target != TENSORRT_RTX:
            return
        if self.hardware_compatible != "none":
            raise UnsupportedError(
                "engines of TensorRT for RTX run on all its devices already; leave --hardware-compatible out."
            )
        if self.strip_weights:
            raise UnsupportedError(
                "TensorRT for RTX strips weights only with a GPU at hand, which its builds do without; export with "
                "--weights-as inputs for an engine without weights."
            )

    def recorded(self) -> dict[str, str | int | bool | None]:
        """What of the options shapes the engine, for its record."""
        return {
            "workspace_bytes": self.workspace_bytes,
            "optimization_level": self.optimization_level,
            "version_compatible": self.version_compatible,
            "hardware_compatible": self.hardware_compatible,
            "weight_streaming": self.weight_streaming,
            "strip_weights": self.strip_weights,
        }
