"""A Hugging Face checkpoint, opened and checked without reading a weight beyond the small norms (and zero points)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qwenforge.errors import CheckpointError
from qwenforge.exporter.checkpoint_files import (
    INDEX_FILE,
    check_folder,
    inside,
    read_json_object,
    weight_files,
)
from qwenforge.exporter.config import ModelConfig
from qwenforge.exporter.expected_tensors import (
    EMBEDDING,
    OUTPUT_HEAD,
    ExpertLayout,
    expected_tensors,
    is_ignored,
)
from qwenforge.exporter.leaves import read_bytes
from qwenforge.exporter.prequantized.contents import Contents, StoredMatrix, check_values, contents
from qwenforge.exporter.prequantized.format import FLOATS, Part, scale_of
from qwenforge.exporter.prequantized.read import read_format
from qwenforge.exporter.quantized_weights import QuantizedWeight
from qwenforge.exporter.safetensors_header import SafetensorsHeader, StoredTensor, read_header
from qwenforge.exporter.text_files import read_generation_config, tokenizer_files
from qwenforge.exporter.transforms import Reshape
from qwenforge.exporter.weights import DerivedTensor, cast, chunks, concat, dims, stack, substitute

_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    # Of quantized checkpoints only.
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "I8": ir.DataType.INT8,
    "I32": ir.DataType.INT32,
    "I64": ir.DataType.INT64,
}
_STACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")


class CheckpointTensor(ir.ExternalTensor):
    """A tensor of a checkpoint: a range of bytes of a ``.safetensors`` file.

    Attributes:
        checkpoint_name: Its name in the checkpoint; ``name`` follows the graph value it becomes the constant of.
    """

    __slots__ = ("checkpoint_name",)

    def __init__(self, stored: StoredTensor, path: Path) -> None:
        """Refer to ``stored`` in the file ``path``, which must be absolute and trusted."""
        super().__init__(
            path, stored.offset, stored.length, _DTYPES[stored.dtype], shape=ir.Shape(stored.shape), name=stored.name
        )
        self.checkpoint_name = stored.name


class CheckpointWeight(DerivedTensor):
    """A matrix of a quantized checkpoint, dequantized to float32 when it is read.

    Attributes:
        checkpoint_name: The name that the weight has in an unquantized checkpoint.
    """

    whole = True

    def __init__(self, name: str, quantized: QuantizedWeight) -> None:
        """Stand for ``quantized`` under ``name``."""
        dequantized = quantized.dequantized()
        assert isinstance(dequantized, DerivedTensor)
        super().__init__(dequantized.transform, dequantized.sources, name=name)
        self.checkpoint_name = name


class SealedWeight(DerivedTensor):
    """A :class:`CheckpointWeight` in a template, which no rule may take apart into codes and scales.

    A layer's copy has other codes, and perhaps none: :func:`~qwenforge.exporter.instantiate.instantiate` exchanges the
    weight as a whole.
    """

    whole = True

    def __init__(self, weight: CheckpointWeight) -> None:
        """The same numbers as ``weight``."""
        super().__init__(Reshape(dims(weight)), [weight], name=weight.name)
        self.checkpoint_name = weight.checkpoint_name


def sealed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same plan with every quantized weight in it sealed."""
    return substitute(tensor, lambda leaf: SealedWeight(leaf) if isinstance(leaf, CheckpointWeight) else leaf)


def checkpoint_names(tensor: ir.TensorProtocol) -> Iterator[str]:
    """The names of the checkpoint's weights that a plan is made of, repeats included."""
    if isinstance(tensor, (CheckpointTensor, CheckpointWeight, SealedWeight)):
        yield tensor.checkpoint_name
    elif isinstance(tensor, DerivedTensor):
        for source in tensor.sources:
            yield from checkpoint_names(source)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; make one with :meth:`open`.

    Attributes:
        folder: The checkpoint folder.
        config: Its architecture.
        generation_config: ``generation_config.json``, empty when absent.
        tokenizer_files: The tokenizer's files that exist, by name.
        weight_files: The weights files, by name in the folder; the paths are real ones.
        expert_layout: How the experts are stored; "per_expert" for dense models.
        quantized: What is stored quantized and how; None in a checkpoint of floating-point numbers.
        scale_dtype: The dtype that scales are rounded to, see :meth:`with_scales_in`; None for the stored one.
        is_widened: Whether quantized weights are given as floating-point numbers and nothing else.
    """

    folder: Path
    config: ModelConfig
    generation_config: Mapping[str, Any]
    tokenizer_files: Mapping[str, Path]
    weight_files: Mapping[str, Path]
    expert_layout: ExpertLayout
    quantized: Contents | None
    _headers: tuple[SafetensorsHeader, ...] = field(repr=False)
    _stored: Mapping[str, tuple[StoredTensor, Path]] = field(repr=False)
    scale_dtype: ir.DataType | None = None
    is_widened: bool = False

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint folder and check every file and tensor that will be used.

        Raises:
            CheckpointError: The folder is incomplete, damaged or no checkpoint; the message names file and tensor.
            UnsupportedError: The architecture asks for something this project does not do.
        """
        folder = Path(path)
        check_folder(folder)
        config_file = inside(folder, "config.json", named_by=str(folder))
        config = ModelConfig.parse(read_json_object(config_file), where=str(folder / "config.json"))
        files, index = weight_files(folder)
        headers = {name: read_header(real) for name, real in files.items()}
        stored = _collect(folder, headers, index)
        layout = _layout(stored)
        expected = expected_tensors(config, layout)
        format_ = read_format(folder, config.source)
        dtypes = {name: tensor.dtype for name, (tensor, _) in stored.items()}
        quantized = contents(format_, expected, dtypes) if format_ is not None else None
        parts = quantized.tensors if quantized else {name: Part((shape,), FLOATS) for name, shape in expected.items()}
        _check_tensors(folder, config, stored, parts, headers)
        _check_norms(folder, stored, files)
        if quantized is not None:
            check_values(quantized, {name: CheckpointTensor(t, files[file]) for name, (t, file) in stored.items()})
        opened = cls(
            folder=folder,
            config=config,
            generation_config=read_generation_config(folder),
            tokenizer_files=tokenizer_files(folder),
            weight_files=files,
            expert_layout=layout,
            quantized=quantized,
            _headers=tuple(headers.values()),
            _stored={name: (tensor, files[file]) for name, (tensor, file) in stored.items()},
        )
        return opened._untied() if opened._holds_two_embeddings() else opened

    def _holds_two_embeddings(self) -> bool:
        """Whether the config ties tensors that are both stored and differ."""
        if not self.config.tie_word_embeddings or not {EMBEDDING, OUTPUT_HEAD} <= set(self.names):
            return False
        if OUTPUT_HEAD in self._matrices:
            return True
        pair = self.tensor(EMBEDDING), self.tensor(OUTPUT_HEAD)
        return pair[0].dtype != pair[1].dtype or not all(
            np.array_equal(*blocks) for blocks in zip(*(chunks(tensor) for tensor in pair), strict=True)
        )

    def _untied(self) -> Checkpoint:
        """transformers ties nothing then, whatever the config says."""
        return replace(self, config=replace(self.config, tie_word_embeddings=False))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weights, ignored buffers excluded; of a quantized matrix, the unquantized one's name."""
        if self.quantized is None:
            return tuple(self._stored)
        plain = (name for name in self._stored if name in self.quantized.plain)
        return (*plain, *self._matrices)

    def tensor(self, name: str) -> CheckpointTensor | CheckpointWeight | SealedWeight:
        """The weight of that name, a new object at each call; raises CheckpointError when there is none."""
        if name in self._matrices:
            found = CheckpointWeight(name, self.quantized_weight(name))
            return SealedWeight(found) if self.is_widened else found
        return self._stored_tensor(name)

    def quantized_weight(self, name: str) -> QuantizedWeight:
        """The codes and scales of the weight ``name``, which must be stored quantized."""
        assert self.quantized is not None
        matrix = self.quantized.matrices[name]
        parts = {part: self._stored_tensor(f"{matrix.module}.{part}") for part in matrix.parts}
        found = self.quantized.weight(name, parts)
        if self.scale_dtype is None:
            return found
        return replace(found, scales=cast(cast(found.scales, self.scale_dtype), ir.DataType.FLOAT))

    def with_scales_in(self, dtype: ir.DataType) -> Checkpoint:
        """The same checkpoint, the scales of its quantized weights rounded to ``dtype``.

        Strongly typed networks hold scales in the model's dtype. Where that is the scales' own nothing changes; else
        each scale moves by at most half a unit in its last place, as unquantized weights do.
        """
        return replace(self, scale_dtype=dtype)

    def widened(self) -> Checkpoint:
        """The same checkpoint as if it had been stored in floating point: codes and scales are not to be found."""
        return replace(self, is_widened=True)

    def scale(self, name: str) -> float:
        """The number in a stored tensor of one element; raises CheckpointError when there is none."""
        return scale_of(name, self._stored_tensor(name))

    @property
    def _matrices(self) -> Mapping[str, StoredMatrix]:
        return self.quantized.matrices if self.quantized is not None else {}

    def _stored_tensor(self, name: str) -> CheckpointTensor:
        if name not in self._stored:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}")
        stored, path = self._stored[name]
        return CheckpointTensor(stored, path)

    def state_tensor(self, name: str) -> ir.TensorProtocol:
        """The tensor transformers' module has under ``name`` in its ``state_dict()``, as a plan over stored ones.

        Experts are stacked, gate before up: ``mlp.experts.gate_up_proj`` [E, 2I, C], ``mlp.experts.down_proj``
        [E, C, I]. Tied embeddings stand for each other when one of them is absent.
        """
        if name in self._stored or name in self._matrices:
            return self.tensor(name)
        if self.config.tie_word_embeddings and name in (EMBEDDING, OUTPUT_HEAD):
            return self.tensor(EMBEDDING if name == OUTPUT_HEAD else OUTPUT_HEAD)
        match = _STACKED.fullmatch(name)
        if match is None:
            return self.tensor(name)
        experts = [f"{match[1]}.{index}" for index in range(self.config.num_experts)]
        if match[2] == "down_proj":
            return stack([self.tensor(f"{expert}.down_proj.weight") for expert in experts])
        return stack(
            [
                concat([self.tensor(f"{expert}.gate_proj.weight"), self.tensor(f"{expert}.up_proj.weight")], 0)
                for expert in experts
            ]
        )

    def fingerprint(self) -> str:
        """A hash, in hexadecimal, of the configuration and of every weights file's name, size and header.

        It is cheap: weights changed in place, under the same header, go unnoticed.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, header in zip(self.weight_files, self._headers, strict=True):
            digest.update(f"\n{name} {header.size} {header.digest}".encode())
        return digest.hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(stored.length for stored, _ in self._stored.values())

    def largest_tensor_bytes(self, dtype: ir.DataType | None = None) -> int:
        """Bytes the largest stored tensor takes, or the largest weight converted to ``dtype`` when that is given."""
        if dtype is None:
            return max(stored.length for stored, _ in self._stored.values())
        sizes = [math.prod(self._stored[name][0].shape) for name in self.names if name not in self._matrices]
        sizes += [matrix.rows * matrix.columns for matrix in self._matrices.values()]
        return math.ceil(max(sizes) * dtype.itemsize)


def _collect(
    folder: Path, headers: Mapping[str, SafetensorsHeader], index: Mapping[str, str] | None
) -> dict[str, tuple[StoredTensor, str]]:
    """Every tensor that is not ignored and the name of its file; what the index says must be what the files hold."""
    stored: dict[str, tuple[StoredTensor, str]] = {}
    for file, header in headers.items():
        for name, tensor in header.tensors.items():
            if is_ignored(name):
                continue
            if index is not None and index.get(name) != file:
                said = f"is listed in {index[name]}" if name in index else "is not listed"
                raise CheckpointError(
                    f"{folder / file} holds tensor {name!r}, which {said} in {INDEX_FILE}: download the files again"
                )
            stored[name] = (tensor, file)
    for name, file in (index or {}).items():
        if name not in headers[file].tensors:
            raise CheckpointError(
                f"{folder / file} lacks tensor {name!r}, which {INDEX_FILE} lists there: download the files again"
            )
    return stored


def _check_norms(folder: Path, stored: Mapping[str, tuple[StoredTensor, str]], files: Mapping[str, Path]) -> None:
    """Refuse a norm of zeros: its layer would say nothing, and a broken download leaves zeros where data should be."""
    for name, (tensor, file) in stored.items():
        if not name.endswith("norm.weight"):
            continue
        if not any(block.any() for block in read_bytes(CheckpointTensor(tensor, files[file]), 1 << 16)):
            raise CheckpointError(
                f"{folder / file}: tensor {name!r} holds nothing but zeros, as after a broken download: download the "
                "file again"
            )


def _layout(stored: Mapping[str, Any]) -> ExpertLayout:
    return "stacked" if any(_STACKED.fullmatch(name) for name in stored) else "per_expert"


def _check_tensors(
    folder: Path,
    config: ModelConfig,
    stored: Mapping[str, tuple[StoredTensor, str]],
    expected: Mapping[str, Part],
    headers: Mapping[str, SafetensorsHeader],
) -> None:
    where = folder / (INDEX_FILE if len(headers) > 1 else next(iter(headers)))
    missing = [name for name, part in expected.items() if part.required and name not in stored]
    if config.tie_word_embeddings and len({EMBEDDING, OUTPUT_HEAD} & set(missing)) == 1:
        missing = [name for name in missing if name not in (EMBEDDING, OUTPUT_HEAD)]
    if missing:
        raise CheckpointError(
            f"{where} lacks tensor {missing[0]!r}{_and_more(missing)}, which config.json asks for: download the "
            "weights again or correct config.json"
        )
    extra = [name for name in stored if name not in expected]
    if extra:
        raise CheckpointError(
            f"{folder / stored[extra[0]][1]} holds tensor {extra[0]!r}{_and_more(extra)}, which config.json leaves no "
            "place for: correct config.json or use the matching weights"
        )
    for name, (tensor, file) in stored.items():
        part = expected[name]
        if tensor.shape not in part.shapes:
            raise CheckpointError(
                f"{folder / file}: tensor {name!r} has shape {list(tensor.shape)} but config.json makes it "
                f"{list(part.shapes[0])}: correct config.json or use the matching weights"
            )
        if tensor.dtype not in part.dtypes:
            raise CheckpointError(
                f"{folder / file}: tensor {name!r} has dtype {tensor.dtype}, only {', '.join(part.dtypes)} are "
                "supported: use the unquantized checkpoint, or correct quantization_config"
            )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
