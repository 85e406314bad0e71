"""Whether memory suffices, asked before any work: host memory for the build, the device's for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from qwenforge.devices import Device
from qwenforge.engine.planning.plan import BUILD_COPIES, BUILDER_BYTES, CONTEXT_BYTES, SYSTEM_BYTES
from qwenforge.engine.units import size
from qwenforge.errors import UserError
from qwenforge.manifest import Manifest, TensorSpec

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}
RTX_BUILDER_BYTES = 800_000_000
"""What TensorRT for RTX takes besides the weights: it compiles kernels later, on the device."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a build takes on the host and that the engine takes on its device; estimates.

    Attributes:
        host: the builder, and the weights that go into the engine three times: as parsed, in the builder's own form and
            in the serialized engine.
        weights: on the device, in the engine or bound to it.
        caches: keys and values of the largest batch.
        logits: the logits and activations of the largest prompt, roughly.
    """

    host: int
    weights: int
    caches: int
    logits: int

    @property
    def device(self) -> int:
        """All that the device holds."""
        return self.weights + self.caches + self.logits + int(CONTEXT_BYTES)


def memory_need(manifest: Manifest, batch: int, longest: int, *, rtx: bool) -> MemoryNeed:
    """Estimate the need of ``manifest``'s engine for ``batch`` rows and prompts of ``longest`` tokens."""
    bound = _volume(manifest.weight_inputs)
    stored = sum(record.bytes for name, record in manifest.files.items() if name.endswith(".onnx.data"))
    caches = [spec for spec in manifest.inputs if spec.name.startswith("past_key_values.")]
    hidden, vocabulary = manifest.model.hidden_size, manifest.model.vocab_size
    return MemoryNeed(
        host=(RTX_BUILDER_BYTES if rtx else int(BUILDER_BYTES)) + BUILD_COPIES * stored,
        weights=stored + bound,
        caches=batch * _volume(caches),
        logits=4 * batch * vocabulary + 16 * batch * longest * hidden,
    )


def require_memory(need: MemoryNeed, available_host: int, device: Device | None, device_bytes: int | None) -> None:
    """Refuse a build that would end for want of memory.

    Args:
        need: from :func:`memory_need`.
        available_host: free memory of this machine, in bytes.
        device: what the engine is for; None for any.
        device_bytes: of the GPU at hand, where it is the one; otherwise the device table's figure counts.

    Raises:
        UserError: with the figures and what to change.
    """
    if need.host > available_host:
        raise UserError(
            f"the build takes about {size(need.host)} of memory and {size(available_host)} are free: free some, export "
            "with --weights-as inputs, which keeps weights out of the build, or try it anyway with --no-memory-check."
        )
    if device is None and device_bytes is None:
        return
    total = device_bytes or (device.memory_bytes if device is not None else 0)
    usable = total - int(SYSTEM_BYTES) if device is not None and device.unified_memory else total
    if need.device > usable:
        name = device.name if device is not None else "the GPU"
        raise UserError(
            f"the engine would take about {size(need.device)} on {name}, which has {size(usable)} for it (weights "
            f"{size(need.weights)}, caches {size(need.caches)}): export with a smaller --max-length or --max-batch, as "
            "'qwenforge plan' shows, or build it anyway with --no-memory-check."
        )


def _volume(specs: Sequence[TensorSpec]) -> int:
    """Bytes of tensors, a symbolic dimension counting as 1."""
    return sum(
        _BYTES.get(spec.dtype, 2) * prod(dim if isinstance(dim, int) else 1 for dim in spec.shape) for spec in specs
    )
