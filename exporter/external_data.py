"""Writing a model whose initializers are plans: ``model.onnx`` plus one data file, streamed, hashed, nothing twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir

from qwenforge.errors import GraphError, UserError
from qwenforge.exporter.data_writer import DataWriter, Progress
from qwenforge.exporter.leaves import mapped_array
from qwenforge.exporter.weights import dims, leaves

INLINE_BYTES = 1024
"""Initializers below this size stay inside the model file."""

_MAX_PROTO_BYTES = (1 << 31) - 1


@dataclass(frozen=True)
class WrittenFile:
    """A file that :func:`save_model` wrote, its hash computed while writing."""

    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SaveReport:
    """What :func:`save_model` did.

    Attributes:
        model: The ONNX file.
        data: The data file, None when every initializer is inline or linked.
        initializers: How many initializers the model has.
        duplicate_bytes: Bytes not written because an identical initializer already was.
        linked_bytes: Bytes of initializers that refer to linked files.
    """

    model: WrittenFile
    data: WrittenFile | None
    initializers: int
    duplicate_bytes: int
    linked_bytes: int

    @property
    def files(self) -> tuple[WrittenFile, ...]:
        """Every file written."""
        return (self.model,) if self.data is None else (self.model, self.data)


def save_model(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    link: Mapping[str | os.PathLike[str], str] | None = None,
    replace: bool = False,
) -> SaveReport:
    """Write ``model`` to ``path`` and its initializers, one block in memory at a time, to ``<path>.data``.

    Both files appear under their final names only when complete. Initializers under 1 KiB stay inline; those with
    identical bytes share one place in the data file; offsets are aligned to 4096 bytes from 64 KiB on, else to 64.

    Args:
        model: Any onnx_ir model; its initializers keep their tensors unless ``replace``.
        path: The ONNX file to write; its folder must exist.
        progress: Told after each piece.
        link: File -> its location relative to the model's folder, as :func:`link_checkpoint_files` returns them;
            an initializer that is an unchanged range of such a file refers to it instead of being copied.
        replace: Make the initializers of the model in memory refer to the written files.

    Raises:
        UserError: The files cannot be written (disk full, no permission) or a leaf cannot be read.
        GraphError: The graph without its data is beyond protobuf's 2 GiB, or the model reads from the very file to
            be written and ``replace`` is not set.
    """
    target = Path(path)
    data_path = target.with_name(target.name + ".data")
    values = [
        value for graph in model.graphs() for value in graph.initializers.values() if value.const_value is not None
    ]
    if not replace:
        _refuse_overwriting_sources(values, data_path)
    placed = _Placement({os.path.realpath(file): location for file, location in (link or {}).items()}, target.parent)
    total = sum(_tensor(value).nbytes for value in values if placed.is_written(_tensor(value)))
    try:
        with _complete_or_absent(target) as model_file, _complete_or_absent(data_path) as data_file:
            writer = DataWriter(data_file, data_path, total, progress)
            stored = [placed.store(_tensor(value), str(value.name), writer) for value in values]
            blob = _serialize(model, values, stored)
            model_file.write(blob)
        if not writer.size:
            data_path.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another folder"
        ) from error
    if replace:
        for value, tensor in zip(values, stored, strict=True):
            value.const_value = tensor
    return SaveReport(
        model=WrittenFile(target, len(blob), hashlib.sha256(blob).hexdigest()),
        data=WrittenFile(data_path, writer.size, writer.sha256) if writer.size else None,
        initializers=len(values),
        duplicate_bytes=writer.duplicate_bytes,
        linked_bytes=placed.linked_bytes,
    )


def link_checkpoint_files(
    bundle_dir: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]
) -> dict[str | os.PathLike[str], str]:
    """Hard-link checkpoint files into ``bundle_dir``/weights and return file -> location for :func:`save_model`.

    ONNX Runtime refuses external data whose real path leaves the model's folder, so neither a path with ``..`` nor a
    symbolic link will do; a hard link does (tested with 1.32).

    Raises:
        UserError: The filesystem cannot link them, for example because the bundle is on another disk.
    """
    folder = Path(bundle_dir) / "weights"
    locations: dict[str | os.PathLike[str], str] = {}
    for file in files:
        source = Path(os.path.realpath(file))
        name = Path(file).name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.link(source, folder / name)
        except OSError as error:
            raise UserError(
                f"cannot hard-link {source} into {folder}: {error.strerror or error}; put the bundle on the "
                "checkpoint's disk or export with --weights copy"
            ) from error
        locations[file] = f"{folder.name}/{name}"
    return locations


def load_model(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX model without its data; initializers refer to their files, linked ones included.

    Unlike ``ir.load`` this accepts hard links inside the model's folder, which ``export --weights link`` makes;
    locations outside the folder are refused.

    Raises:
        GraphError: The file is no ONNX model, or an initializer's data lies outside the model's folder.
    """
    source = Path(path)
    try:
        model = ir.load(source)
    except Exception as error:  # protobuf, onnx and onnx_ir each raise their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GraphError(f"{source} cannot be read as an ONNX model ({reason}): export it again") from error
    base = Path(os.path.realpath(source.parent))
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            file = Path(os.path.realpath(base / tensor.location))
            if not file.is_relative_to(base):
                raise GraphError(
                    f"{source}: the data of initializer {value.name!r} is at {os.fspath(tensor.location)!r}, outside "
                    "the model's folder; move it beside the model"
                )
            value.const_value = ir.ExternalTensor(
                file, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(dims(tensor)), name=str(value.name)
            )
    return model


class _Placement:
    """Decides where an initializer's bytes go: inline, to a linked file, or to the data file."""

    def __init__(self, linked: Mapping[str, str], folder: Path) -> None:
        self._linked = linked
        self._folder = folder
        self.linked_bytes = 0

    def is_written(self, tensor: ir.TensorProtocol) -> bool:
        return not self._is_inline(tensor) and self._link(tensor) is None

    def store(self, tensor: ir.TensorProtocol, name: str, writer: DataWriter) -> ir.TensorProtocol:
        """A tensor to serialize in place of ``tensor``, its bytes in their final place."""
        if self._is_inline(tensor):
            return _in_memory(tensor, name)
        location, offset = self._link(tensor), 0
        if location is None:
            location, offset = writer.location, writer.write(tensor, name)
        elif isinstance(tensor, ir.ExternalTensor):
            offset = tensor.offset or 0
            self.linked_bytes += tensor.nbytes
        return ir.ExternalTensor(
            location,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(dims(tensor)),
            name=name,
            base_dir=self._folder,
        )

    def _is_inline(self, tensor: ir.TensorProtocol) -> bool:
        return tensor.nbytes < INLINE_BYTES or tensor.dtype == ir.DataType.STRING

    def _link(self, tensor: ir.TensorProtocol) -> str | None:
        if not self._linked or not isinstance(tensor, ir.ExternalTensor):
            return None
        return self._linked.get(os.path.realpath(tensor.path))


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"initializer {value.name!r} has no tensor")
    return tensor


def _in_memory(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    if tensor.dtype == ir.DataType.STRING:
        return tensor
    array = np.array(mapped_array(tensor)) if tensor.dtype.bitwidth >= 8 else tensor.numpy()
    return ir.Tensor(array, dtype=tensor.dtype, shape=ir.Shape(dims(tensor)), name=name)


def _refuse_overwriting_sources(values: Sequence[ir.Value], data_path: Path) -> None:
    overwritten = os.path.realpath(data_path)
    for value in values:
        for leaf in leaves(_tensor(value)):
            if isinstance(leaf, ir.ExternalTensor) and os.path.realpath(leaf.path) == overwritten:
                raise GraphError(
                    f"{data_path} holds initializer {value.name!r} of the model being saved: save to another folder"
                )


def _serialize(model: ir.Model, values: Sequence[ir.Value], stored: Sequence[ir.TensorProtocol]) -> bytes:
    """The model's bytes with ``stored`` as its initializers; the model is as before afterwards."""
    originals = [value.const_value for value in values]
    try:
        for value, tensor in zip(values, stored, strict=True):
            value.const_value = tensor
        proto = ir.to_proto(model)
    finally:
        for value, original in zip(values, originals, strict=True):
            value.const_value = original
    if proto.ByteSize() > _MAX_PROTO_BYTES:
        raise GraphError(
            f"the graph takes {proto.ByteSize()} bytes without its initializers, beyond protobuf's 2 GiB: "
            "turn large constants into initializers"
        )
    blob: bytes = proto.SerializeToString(deterministic=True)
    return blob


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``path`` that takes its name when the block ends well and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "w+b") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
