"""What a calibration leaves on disk as it goes, so that one that was killed goes on where it was.

``calibration.json`` says what is calibrated: model, recipe, data, threads. After each piece of the model its results
are committed as ``piece-3.safetensors`` and, last, ``piece-3.json``; values that later pieces read lie in ``values/``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, ValidationError

from qwenforge.calibration.data import CalibrationData
from qwenforge.calibration.recipes import Recipe
from qwenforge.calibration.spill import SpilledValue
from qwenforge.errors import UserError
from qwenforge.exporter.leaves import read_blocks
from qwenforge.exporter.safetensors_header import read_header
from qwenforge.exporter.weights import DerivedTensor
from qwenforge.graph_passes.quantize.plan import SitePlan

Array = npt.NDArray[Any]

WORK_VERSION = 1
"""Raised when results change: a calibration begun by an older version is not gone on with."""

_IDENTITY = "calibration.json"
_DTYPES = {"F32": ir.DataType.FLOAT, "I8": ir.DataType.INT8}
_INLINE = 1 << 16


class Outlier(BaseModel):
    """A channel that is far larger than the median one of its tensor.

    Attributes:
        site: whose input or weight it is of.
        channel: its number.
        ratio: its largest magnitude over the median channel's.
        of: ``input``, ``weight row`` (an output channel) or ``weight column`` (an input channel).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    site: str
    channel: int
    ratio: float
    of: str


class Coverage(BaseModel):
    """How many calibration tokens each expert of a layer was given.

    Attributes:
        site: the experts.
        tokens: by expert.
        floor: fewer than this are too few; such experts fall back to the statistics of their weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    site: str
    tokens: tuple[int, ...]
    floor: int

    @property
    def below_floor(self) -> tuple[int, ...]:
        """Experts with too few tokens, dead ones included."""
        return tuple(expert for expert, count in enumerate(self.tokens) if count < self.floor)

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts without any token."""
        return tuple(expert for expert, count in enumerate(self.tokens) if count == 0)


class StoredValue(BaseModel):
    """Where a value that crosses a cut lies."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    shape: tuple[int, ...]
    dtype: str


class PieceResult(BaseModel):
    """What calibrating one piece gave, tensors apart."""

    model_config = ConfigDict(extra="forbid")
    sites: dict[str, SitePlan] = {}
    caches: tuple[str, ...] = ()
    smoothed: tuple[str, ...] = ()
    coverage: tuple[Coverage, ...] = ()
    outliers: tuple[Outlier, ...] = ()
    warnings: tuple[str, ...] = ()
    values: dict[str, StoredValue] = {}
    mean_loss: float | None = None


class WorkFolder:
    """A calibration's folder; everything in it can be deleted when the calibration is done.

    Raises:
        UserError: it holds another calibration, or cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self._values = folder / "values"
        text = json.dumps(dict(identity), indent=1, sort_keys=True) + "\n"
        path = folder / _IDENTITY
        try:
            self._values.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _require_same(path, identity)
            else:
                _write(path, text)
        except OSError as error:
            raise UserError(f"cannot use {folder} as work folder: {error.strerror or error}; choose another") from error

    def committed(self, piece: int) -> PieceResult | None:
        """The results of ``piece``; None when it is still to be done."""
        record = self.folder / f"piece-{piece}.json"
        if not record.exists():
            return None
        try:
            return PieceResult.model_validate_json(record.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{record} is damaged: remove {self.folder} and calibrate again") from error

    def commit(self, piece: int, result: PieceResult, tensors: Mapping[str, Array]) -> None:
        """Make the results of ``piece`` lasting: all of them or none."""
        from safetensors.numpy import save

        try:
            blob = save({name: np.asarray(array, order="C") for name, array in sorted(tensors.items())})
            _write(self.folder / f"piece-{piece}.safetensors", blob)
            _write(self.folder / f"piece-{piece}.json", result.model_dump_json(indent=1))
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}: {error.strerror or error}; free space or use another work folder"
            ) from error

    def tensors(self, pieces: int) -> dict[str, ir.TensorProtocol]:
        """The committed numbers of all pieces by name, lazy."""
        found: dict[str, ir.TensorProtocol] = {}
        for piece in range(pieces):
            header = read_header(self.folder / f"piece-{piece}.safetensors")
            for name, stored in header.tensors.items():
                found[name] = ir.ExternalTensor(
                    header.path.resolve(),
                    stored.offset,
                    stored.length,
                    _DTYPES[stored.dtype],
                    shape=ir.Shape(stored.shape),
                    name=name,
                )
        return found

    def new_value(self, name: str) -> SpilledValue:
        """A file for the value of that name."""
        return SpilledValue(self._values / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.bin")

    def stored_value(self, stored: StoredValue) -> SpilledValue:
        """A value that a committed piece left."""
        return SpilledValue(self._values / stored.file, stored.shape, stored.dtype)

    def keep_only(self, files: set[str]) -> None:
        """Delete the values that nothing will read any more, those of an interrupted piece too."""
        for path in self._values.iterdir():
            if path.name not in files:
                path.unlink()


def stored_threads(folder: Path) -> int | None:
    """The number of threads that the calibration in ``folder`` was begun with; None where there is none."""
    path = folder / _IDENTITY
    if not path.is_file():
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["threads"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove {folder} and calibrate again") from error


def identity_of(
    model: ir.Model, recipe: Recipe, data: CalibrationData | None, settings: Mapping[str, object]
) -> dict[str, str]:
    """What tells one calibration from another, each part as a short text."""
    return {
        "version": str(WORK_VERSION),
        "model": _model_fingerprint(model),
        "recipe": hashlib.sha256(recipe.to_json().encode()).hexdigest(),
        "data": data.fingerprint() if data is not None else "none",
        **{name: str(value) for name, value in settings.items()},
    }


def _require_same(path: Path, identity: Mapping[str, str]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: remove {path.parent} and calibrate again") from error
    differing = sorted(name for name in {*found, *identity} if found.get(name) != identity.get(name))
    if differing:
        raise UserError(
            f"{path.parent} holds a calibration of another {' and '.join(differing)}: remove it, or choose another one"
        )


def _write(path: Path, content: str | bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _model_fingerprint(model: ir.Model) -> str:
    """A hash of the graph and of where its weights come from; of files by name, size and time, not by content."""
    digest = hashlib.sha256()
    known: dict[int, str] = {}
    for node in model.graph:
        read = [value.name if value is not None else None for value in node.inputs]
        attributes = sorted((name, _attribute_text(value)) for name, value in node.attributes.items())
        made = [value.name for value in node.outputs]
        digest.update(repr((node.domain, node.op_type, read, attributes, made)).encode())
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        digest.update(f"{name} {_tensor_fingerprint(value.const_value, known)}".encode())
    return digest.hexdigest()


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return _tensor_fingerprint(attribute.as_tensor(), {})
    return str(attribute.value)


def _tensor_fingerprint(tensor: ir.TensorProtocol, known: dict[int, str]) -> str:
    if id(tensor) in known:
        return known[id(tensor)]
    if isinstance(tensor, DerivedTensor):
        parts = [_tensor_fingerprint(source, known) for source in tensor.sources]
        text = repr((tensor.transform, parts))
    elif isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > _INLINE:
        status = os.stat(tensor.path)
        where = os.path.realpath(tensor.path)
        text = repr((where, status.st_size, status.st_mtime_ns, tensor.offset, tensor.nbytes, tensor.dtype.name))
    else:
        content = hashlib.sha256()
        for block in read_blocks(tensor, _INLINE):
            content.update(block.tobytes())
        text = repr((tensor.dtype.name, list(tensor.shape), content.hexdigest()))
    known[id(tensor)] = hashlib.sha256(text.encode()).hexdigest()
    return known[id(tensor)]
