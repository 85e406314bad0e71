"""Whether an engine runs here: device, TensorRT version, plugin library and graph are those it was built with."""

from __future__ import annotations

from qwenforge.bundle import Bundle
from qwenforge.devices import Device
from qwenforge.engine.tensorrt.gpu import LocalGpu
from qwenforge.errors import UnsupportedError, UserError
from qwenforge.manifest import MODEL_NAME, EngineRecord
from qwenforge.tensorrt_choice import RTX_SMS, TENSORRT_RTX


def build_command(bundle: str, device: str | None, *, rebuild: bool = False) -> str:
    """The command that makes the engine of ``bundle``."""
    return f"qwenforge build {bundle}" + (f" --device {device}" if device else "") + (" --rebuild" if rebuild else "")


def export_command(target: str, device: str | None, version: str | None) -> str:
    """The options that lower a checkpoint for a device and version."""
    parts = [f"--target {target}", f"--device {device}" if device else "", f"--tensorrt {version}" if version else ""]
    return " ".join(part for part in parts if part)


def require_engine(bundle: Bundle, gpu: LocalGpu | None, installed: str, plugin_library: str | None) -> EngineRecord:
    """The bundle's engine, once it is sure to be loadable here.

    The bundle's own check, when it is opened, has seen that the engine's bytes are those of the manifest.

    Args:
        bundle: an opened bundle.
        gpu: of this machine.
        installed: version of the TensorRT module that would load the engine.
        plugin_library: version of the plugin library at hand, None where there is none.

    Raises:
        UserError: there is no engine, or it was built for something else; the message has the command to rebuild it.
    """
    record = bundle.manifest.engine
    if record is None:
        lowering = bundle.manifest.lowering
        device = lowering.device if lowering is not None else None
        raise UserError(f"{bundle.path} has no engine yet: run {build_command(str(bundle.path), device)}.")
    again = f"run {build_command(str(bundle.path), record.device, rebuild=True)}"
    if bundle.manifest.files[MODEL_NAME].sha256 != record.model_sha256:
        raise UserError(f"the engine in {bundle.path} was built from another graph than the bundle's: {again}.")
    if gpu is None:
        raise UserError(f"the engine in {bundle.path} runs on an NVIDIA GPU, and none is visible here.")
    rtx = record.target == TENSORRT_RTX
    wrong_device = gpu.sm not in RTX_SMS if rtx and record.sm is None else record.sm != gpu.sm
    if wrong_device and record.options.get("hardware_compatible") != "ampere+":
        built_for = f"{record.device} (SM {record.sm})" if record.sm is not None else "GPUs of TensorRT for RTX"
        raise UnsupportedError(
            f"the engine in {bundle.path} was built for {built_for} and this is {gpu.name} (SM {gpu.sm}): export for "
            f"it with --device, or on the right device {again}."
        )
    if installed != record.tensorrt and not record.options.get("version_compatible"):
        raise UnsupportedError(
            f"the engine in {bundle.path} was built by {record.module} {record.tensorrt} and {installed} is installed: "
            f"{again}."
        )
    if record.plugin_library is not None and plugin_library != record.plugin_library:
        found = f"version {plugin_library} is here" if plugin_library else "there is none here"
        raise UserError(
            f"the engine in {bundle.path} needs the plugin library of version {record.plugin_library} and {found}: "
            f"build it with 'make plugins', or {again}."
        )
    return record


def require_build_device(target: str, device: Device | None, gpu: LocalGpu | None, bundle: str) -> None:
    """Make sure that TensorRT can build for ``device`` here: it builds for the GPU it runs on.

    Raises:
        UserError: there is no GPU, or it is another one.
    """
    if target == TENSORRT_RTX or device is None:
        return
    if gpu is None:
        raise UserError(
            f"TensorRT builds an engine on the GPU that it is for, and no NVIDIA GPU is visible here: copy {bundle} to "
            f"a {device.name} and run this command there, or export with --target tensorrt-rtx, which builds anywhere."
        )
    if gpu.sm != device.sm:
        raise UserError(
            f"TensorRT builds an engine for the GPU that it runs on, which is {gpu.name} (SM {gpu.sm}) here and not "
            f"{device.name} (SM {device.sm}): run this command on a {device.name}, or export for this GPU."
        )
