"""What is known of a compiled engine: its record, its graph, and, where a GPU allows it, TensorRT's own inspector."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenforge.bundle import Bundle
from qwenforge.engine.inspection import Inspection, inspect_model, read_model
from qwenforge.engine.tensorrt.gpu import LocalGpu, local_gpu
from qwenforge.engine.tensorrt.load import load_engine
from qwenforge.errors import BundleError, UserError
from qwenforge.manifest import MANIFEST_NAME, EngineRecord

SUFFIXES = (".plan", ".engine")


@dataclass(frozen=True)
class EngineInspection:
    """A report on one engine.

    Attributes:
        path: the engine's file.
        bytes: its size.
        record: how it was built; None for an engine of no bundle.
        network: the graph that it was built from; None for an engine of no bundle.
        layers: the inspector's layers, as TensorRT words them; None where it could not be asked.
        unknown: why something is not known, one sentence each.
    """

    path: Path
    bytes: int
    record: EngineRecord | None
    network: Inspection | None
    layers: list[Any] | None
    unknown: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "engine": str(self.path),
            "bytes": self.bytes,
            "record": self.record.model_dump(mode="json") if self.record is not None else None,
            "network": self.network.to_json() if self.network is not None else None,
            "layers": self.layers,
            "unknown": list(self.unknown),
        }


def inspect_engine(path: Path, *, gpu: Callable[[], LocalGpu | None] = local_gpu) -> EngineInspection:
    """Report on the engine file ``path``, in a bundle or alone.

    Raises:
        BundleError: there is no such file, or the bundle around it is damaged.
    """
    if not path.is_file():
        raise BundleError(f"{path} does not exist; give an engine that 'qwenforge build' wrote, or a bundle folder")
    size = path.stat().st_size
    if not (path.parent / MANIFEST_NAME).is_file():
        alone = f"{path.name} is in no bundle: what it was built from and for is not recorded"
        return EngineInspection(path, size, None, None, None, (alone,))
    bundle = Bundle.open(path.parent)
    record = bundle.manifest.engine
    if record is None or record.file != path.name:
        other = f"{path.name} is not the engine that the bundle's manifest records"
        return EngineInspection(path, size, None, None, None, (other,))
    network = inspect_model(read_model(bundle.model_path), path.name)
    try:
        return EngineInspection(path, size, record, network, _inspector_layers(bundle, gpu), ())
    except UserError as error:
        unknown = f"the engine's own layers, tactics and formats: {error}"
        return EngineInspection(path, size, record, network, None, (unknown,))


def _inspector_layers(bundle: Bundle, gpu: Callable[[], LocalGpu | None]) -> list[Any]:
    """The layers that TensorRT's inspector names; UserError where the engine cannot be loaded here."""
    module, engine = load_engine(bundle, gpu=gpu)
    text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    layers: list[Any] = json.loads(text)["Layers"]
    return layers
