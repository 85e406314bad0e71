"""The tensors of a quantized checkpoint, sorted into the matrices they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qwenforge.errors import CheckpointError, UnsupportedError
from qwenforge.exporter.expected_tensors import EMBEDDING, Shape
from qwenforge.exporter.prequantized.format import FLOATS, Format, Part, scale_of, small
from qwenforge.exporter.prequantized.scales import ONE
from qwenforge.exporter.quantized_weights import QuantizedWeight

_ATTENTION = re.compile(r"(model\.layers\.\d+\.self_attn)\.o_proj\.weight")
_CODE_DTYPES = ("F8_E4M3", "I8")


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix that is stored quantized.

    Attributes:
        module: the name of its module; its weight has this name and ``.weight`` behind it.
        rows, columns: of the matrix.
        parts: what is stored of it, the last parts of the tensors' names.
    """

    module: str
    rows: int
    columns: int
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """What a quantized checkpoint must hold.

    Attributes:
        format: its format.
        matrices: what is quantized, by the names of the weights.
        plain: the names of the weights that are not.
        tensors: every stored tensor with what it must be, by name; those that are not required may be absent.
        cache_scales: names of the scale of the keys and that of the values, by layer.
        zero_biases: biases that the model has no place for; all their elements must be 0.
    """

    format: Format
    matrices: Mapping[str, StoredMatrix]
    plain: frozenset[str]
    tensors: Mapping[str, Part]
    cache_scales: tuple[tuple[str, str], ...]
    zero_biases: tuple[str, ...]

    def weight(self, name: str, stored: Mapping[str, ir.ExternalTensor]) -> QuantizedWeight:
        """The matrix of that name over its ``stored`` parts, by their last names."""
        matrix = self.matrices[name]
        return self.format.weight(stored, matrix.rows, matrix.columns)


def contents(format_: Format, expected: Mapping[str, Shape], dtypes: Mapping[str, str]) -> Contents:
    """Sort the stored tensors, whose ``dtypes`` are given by name, where a float checkpoint would hold ``expected``.

    Raises:
        CheckpointError: no matrix is quantized.
        UnsupportedError: a matrix of its shape cannot be in this format.
    """
    tensors = {name: Part((shape,), FLOATS) for name, shape in expected.items()}
    matrices: dict[str, StoredMatrix] = {}
    biases: list[str] = []
    for name, shape in expected.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or name == EMBEDDING or not _is_quantized(format_, module, dtypes):
            continue
        rows, columns = shape
        parts = format_.parts(rows, columns)
        del tensors[name]
        tensors |= {f"{module}.{part}": wanted for part, wanted in parts.items()}
        found = tuple(part for part in parts if f"{module}.{part}" in dtypes)
        matrices[name] = StoredMatrix(module, rows, columns, found)
        if f"{module}.bias" in dtypes and f"{module}.bias" not in expected:
            biases.append(f"{module}.bias")
            tensors[biases[-1]] = Part(((rows,),), FLOATS)
    if not matrices:
        raise CheckpointError(
            f"{format_.where} says that the weights are quantized, but no tensor is: use the matching weights"
        )
    cache = _cache_scales(expected, dtypes) if format_.cache is not None else ()
    tensors |= {name: Part(ONE, FLOATS) for pair in cache for name in pair}
    plain = frozenset(expected.keys() - matrices.keys())
    return Contents(format_, matrices, plain, tensors, cache, tuple(biases))


def check_values(found: Contents, stored: Mapping[str, ir.ExternalTensor]) -> None:
    """Check what must be known of the values before anything is exported; reads small tensors alone.

    Raises:
        CheckpointError, UnsupportedError: a value is impossible or not supported.
    """
    for matrix in found.matrices.values():
        parts = {part: stored[f"{matrix.module}.{part}"] for part in matrix.parts}
        found.format.check(matrix.module, parts, matrix.rows, matrix.columns)
        if "input_scale" in parts:
            scale_of(f"{matrix.module}.input_scale", parts["input_scale"])
    for name in (name for pair in found.cache_scales for name in pair):
        scale_of(name, stored[name])
    for name in found.zero_biases:
        if small(stored[name]).any():
            raise UnsupportedError(
                f"tensor {name!r} is a bias that the architecture has no place for and is not zero; use the checkpoint "
                "of an architecture with it"
            )


def _is_quantized(format_: Format, module: str, dtypes: Mapping[str, str]) -> bool:
    if any(f"{module}.{marker}" in dtypes for marker in format_.markers):
        return True
    return dtypes.get(f"{module}.weight") in _CODE_DTYPES


def _cache_scales(expected: Mapping[str, Shape], dtypes: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The names of each layer's scales: on the attention, or on the projections that make keys and values."""
    found = []
    for name in expected:
        if match := _ATTENTION.fullmatch(name):
            on_projections = f"{match[1]}.k_proj.k_scale" in dtypes
            key, value = (f"{match[1]}.{x}_proj.{x}_scale" if on_projections else f"{match[1]}.{x}_scale" for x in "kv")
            found.append((key, value))
    return tuple(found)
