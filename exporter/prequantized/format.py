"""What every format of quantized checkpoints answers: which tensors a matrix is made of, and what they mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from qwenforge.errors import CheckpointError, UnsupportedError
from qwenforge.exporter import weights
from qwenforge.exporter.leaves import read_bytes
from qwenforge.exporter.quantized_weights import QuantizedWeight, WeightFormat
from qwenforge.exporter.transforms import Array, Dims

FLOATS = ("F32", "F16", "BF16")
"""safetensors' names of the dtypes that scales have."""

Parts = Mapping[str, ir.ExternalTensor]
"""The stored tensors of one module by the last part of their names, such as ``qweight``."""


@dataclass(frozen=True)
class Part:
    """One of the tensors that a matrix is stored as.

    Attributes:
        shapes: the shapes it may have; the first is the one to name in a message.
        dtypes: safetensors' names of the dtypes it may have.
        required: whether it must be there.
    """

    shapes: tuple[Dims, ...]
    dtypes: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True)
class CacheScales:
    """How a checkpoint stores its keys and values: with one scale each for a layer's keys and values."""

    format: Literal["int8", "fp8"]


class Format:
    """One format, read from the configuration of a checkpoint.

    Attributes:
        where: the file and field that the format was read from, which opens every message.
        method: the format's name for users, such as ``gptq``.
        markers: last parts of names of tensors that only quantized modules have.
        weight_format: of the codes.
        bits: a stored matrix element takes, scales and zero points included.
        activation: the format that the inputs of quantized modules had with static scales; None for none.
        dynamic: whether the inputs were to be quantized with a scale made for each token while the model runs.
        cache: what the checkpoint says of the key/value cache.
    """

    where: str
    method: str
    markers: tuple[str, ...]
    weight_format: WeightFormat
    bits: float
    activation: Literal["int8", "fp8"] | None = None
    dynamic: bool = False
    cache: CacheScales | None = None

    @property
    def summary(self) -> str:
        """What the weights are, in a few words."""
        return f"{self.weight_format} ({self.method})"

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """The tensors that stand for a matrix [rows, columns], by the last part of their names.

        Raises:
            UnsupportedError: a matrix of that shape cannot be stored in this format.
        """
        raise NotImplementedError

    def check(self, module: str, parts: Parts, rows: int, columns: int) -> None:
        """Check the values of the small tensors that decide how the others are read.

        Raises:
            CheckpointError, UnsupportedError: a value is impossible or not supported.
        """

    def weight(self, parts: Parts, rows: int, columns: int) -> QuantizedWeight:
        """The matrix [rows, columns], over unread tensors."""
        raise NotImplementedError

    def refuse(self, problem: str) -> UnsupportedError:
        """A sentence about the configuration."""
        return UnsupportedError(f"{self.where}: {problem}")


def groups(columns: int, group_size: int) -> int:
    """How many groups of ``group_size`` columns a row has."""
    return -(-columns // group_size)


def float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Scales as float32, which is exact."""
    return weights.cast(tensor, ir.DataType.FLOAT)


def small(tensor: ir.ExternalTensor) -> Array:
    """The values of a tensor that is small enough to be read while a checkpoint is opened."""
    data = b"".join(block.tobytes() for block in read_bytes(tensor, 1 << 24))
    return np.frombuffer(data, tensor.dtype.numpy()).reshape(tuple(tensor.shape.numpy()))


def scale_of(name: str, tensor: ir.ExternalTensor) -> float:
    """The number in a tensor of one element that scales something; raises CheckpointError when it cannot."""
    value = float(small(tensor).astype(np.float32).reshape(-1)[0])
    if not np.isfinite(value) or value <= 0:
        raise CheckpointError(f"tensor {name!r} holds the scale {value}, not a positive number: download it again")
    return value


def require_ordered_groups(module: str, name: str, tensor: ir.ExternalTensor, group_size: int) -> None:
    """Refuse groups of columns that do not lie side by side, which a permutation by activations (act-order) leaves."""
    index = small(tensor)
    if not np.array_equal(index, np.arange(len(index)) // group_size):
        raise UnsupportedError(
            f"{module}.{name} scatters the columns of a group over the matrix (desc_act, act-order), which no kernel "
            "here multiplies by; use the variant without it, or quantize the original checkpoint with --quantize"
        )


class Settings:
    """The fields of a quantization's configuration: read by name, refused with the file's name in front."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Read from ``values``; ``where`` opens every message."""
        self.values = values
        self.where = where

    def choice(self, name: str, supported: Collection[Any], default: Any = None) -> Any:
        """The value of a field that must be one of ``supported``.

        Raises:
            UnsupportedError: it is not; the message names what is supported.
        """
        value = self.values.get(name, default)
        # 1 == True in Python, and a number of bits is no truth value.
        if not any(type(value) is type(other) and value == other for other in supported):
            shown = ", ".join(map(str, supported))
            raise UnsupportedError(f"{self.where}: {name!r} is {value!r}; supported: {shown}")
        return value

    def group_size(self) -> int | None:
        """Columns that share a scale; None for a whole row, written -1."""
        value = self.values.get("group_size", 128)
        if isinstance(value, bool) or not isinstance(value, int) or (value != -1 and value not in (16, 32, 64, 128)):
            raise UnsupportedError(
                f"{self.where}: 'group_size' is {value!r}; supported: 16, 32, 64, 128 and -1 for a whole row"
            )
        return None if value == -1 else value
