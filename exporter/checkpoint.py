"""A Hugging Face checkpoint, opened and checked without reading a weight beyond the small norms."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
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
from qwenforge.exporter.safetensors_header import SafetensorsHeader, StoredTensor, read_header
from qwenforge.exporter.text_files import read_generation_config, tokenizer_files
from qwenforge.exporter.weights import concat, stack

_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
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
    """

    folder: Path
    config: ModelConfig
    generation_config: Mapping[str, Any]
    tokenizer_files: Mapping[str, Path]
    weight_files: Mapping[str, Path]
    expert_layout: ExpertLayout
    _headers: tuple[SafetensorsHeader, ...] = field(repr=False)
    _stored: Mapping[str, tuple[StoredTensor, Path]] = field(repr=False)

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
        _check_tensors(folder, config, stored, layout, headers)
        _check_norms(folder, stored, files)
        opened = cls(
            folder=folder,
            config=config,
            generation_config=read_generation_config(folder),
            tokenizer_files=tokenizer_files(folder),
            weight_files=files,
            expert_layout=layout,
            _headers=tuple(headers.values()),
            _stored={name: (tensor, files[file]) for name, (tensor, file) in stored.items()},
        )
        return opened._untied() if opened._holds_two_embeddings() else opened

    def _holds_two_embeddings(self) -> bool:
        """Whether the config ties tensors that are both stored and differ."""
        if not self.config.tie_word_embeddings or not {EMBEDDING, OUTPUT_HEAD} <= self._stored.keys():
            return False
        pair = self.tensor(EMBEDDING), self.tensor(OUTPUT_HEAD)
        return pair[0].dtype != pair[1].dtype or not all(
            np.array_equal(*blocks) for blocks in zip(*(read_bytes(tensor, 1 << 24) for tensor in pair), strict=True)
        )

    def _untied(self) -> Checkpoint:
        """transformers ties nothing then, whatever the config says."""
        return replace(self, config=replace(self.config, tie_word_embeddings=False))

    @property
    def names(self) -> tuple[str, ...]:
        """The stored tensors' names, ignored buffers excluded."""
        return tuple(self._stored)

    def tensor(self, name: str) -> CheckpointTensor:
        """The stored tensor of that name, a new object at each call; raises CheckpointError when there is none."""
        if name not in self._stored:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}")
        stored, path = self._stored[name]
        return CheckpointTensor(stored, path)

    def state_tensor(self, name: str) -> ir.TensorProtocol:
        """The tensor transformers' module has under ``name`` in its ``state_dict()``, as a plan over stored ones.

        Experts are stacked, gate before up: ``mlp.experts.gate_up_proj`` [E, 2I, C], ``mlp.experts.down_proj``
        [E, C, I]. Tied embeddings stand for each other when one of them is absent.
        """
        if name in self._stored:
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
        """Bytes the largest stored tensor takes, converted to ``dtype`` when that is given."""
        return max(
            stored.length if dtype is None else math.ceil(math.prod(stored.shape) * dtype.itemsize)
            for stored, _ in self._stored.values()
        )


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
    layout: ExpertLayout,
    headers: Mapping[str, SafetensorsHeader],
) -> None:
    expected = expected_tensors(config, layout)
    where = folder / (INDEX_FILE if len(headers) > 1 else next(iter(headers)))
    missing = [name for name in expected if name not in stored]
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
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{folder / file}: tensor {name!r} has shape {list(tensor.shape)} but config.json makes it "
                f"{list(expected[name])}: correct config.json or use the matching weights"
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{folder / file}: tensor {name!r} has dtype {tensor.dtype}, only {', '.join(_DTYPES)} are supported: "
                "use the unquantized checkpoint"
            )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
