"""What is to be quantized and how: the result of a calibration, and all that the graph passes need to know of it.

A plan names sites (:mod:`qwenforge.graph_passes.quantize.sites`). Its numbers (scales, smoothing factors, and codes
where a method chose them itself) are tensors by name, mapped from ``plan.safetensors`` beside ``plan.json``:

==================================  =====================  ============================================================
name                                shape, dtype           meaning
==================================  =====================  ============================================================
``{site}.weight_scales``            [N, G] float32         of a linear site's rows N, G groups of columns
``{site}.weight_zero_points``       [N, G] float32         whole numbers; only where the choice is asymmetric (uint4)
``{site}.weight_codes``             [N, K] int8            whole numbers; only where the method did not round to nearest
``{site}.input_scale``              [] float32             of a linear site's input
``{site}.gate_up_scales``           [E, 2I, G] float32     of an expert site; likewise ``gate_up_codes`` [E, 2I, C]...
``{site}.down_scales``              [E, C, G] float32      likewise ``down_codes`` [E, C, I]...
``{site}.activation_scales``        [1 + E] float32        of the tokens, then of each expert's activated channels
``{site}.key_scales``               [Hk, D] float32        of a cache site
``{site}.value_scales``             [Hk] float32           of a cache site
``{site}.smoothing``                see below              factors s that move range from a site's input to its weight
==================================  =====================  ============================================================

Smoothing divides what makes a site's input by s and multiplies the columns of every matrix that reads it by s, which
changes nothing but ranges. It is named after the norm, or the site, whose input channels it is of:
``model.layers.0.input_layernorm`` [C], ``model.layers.0.post_attention_layernorm`` [C] (router and shared gate read it
too), ``model.layers.0.self_attn.o_proj`` [Hk * D] (rows of v_proj, equal for the query heads that share a key head),
``model.layers.0.mlp.down_proj`` [I] (rows of up), ``model.layers.0.mlp.experts`` [E, I].

Scales and codes are of the smoothed weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qwenforge.errors import UserError
from qwenforge.exporter.quantized_weights import WeightFormat
from qwenforge.exporter.safetensors_header import read_header
from qwenforge.exporter.safetensors_writer import write_safetensors

PLAN_NAME = "plan.json"
TENSORS_NAME = "plan.safetensors"
PLAN_VERSION: Final = 1
_DTYPES = {"F32": ir.DataType.FLOAT, "I8": ir.DataType.INT8}


class _Part(BaseModel):
    """Base of a plan's parts: frozen, and closed to unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SitePlan(_Part):
    """What is done to one linear or expert site.

    Attributes:
        weight: the number format of the weights; None where they stay as they are.
        group_size: columns of a row that share a scale; None for a whole row.
        activation: the format of the input, with a static scale for the whole tensor; None where it is not quantized.
        reason: why the site is not what the recipe asks for in general; empty where it is.
    """

    weight: WeightFormat | None
    group_size: Annotated[int, Field(ge=1)] | None = None
    activation: Literal["int8", "fp8"] | None = None
    reason: str = ""


class CachePlan(_Part):
    """What is done to one layer's key/value cache: ``format`` of its numbers, keys scaled by head and channel."""

    format: Literal["int8", "fp8"]


class _File(_Part):
    version: Literal[1] = PLAN_VERSION
    recipe: str
    sites: dict[str, SitePlan]
    caches: dict[str, CachePlan] = {}
    smoothed: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizationPlan:
    """A plan in memory.

    Attributes:
        recipe: the name of the recipe it was made by.
        sites: by site name; a site that is not listed stays as it is.
        caches: by cache site name.
        smoothed: what has smoothing factors, in the order in which they are applied.
        tensors: by the names above; lazy where the plan was loaded.
    """

    recipe: str
    sites: Mapping[str, SitePlan]
    caches: Mapping[str, CachePlan]
    smoothed: tuple[str, ...]
    tensors: Mapping[str, ir.TensorProtocol]

    def save(self, folder: Path) -> None:
        """Write the plan's two files into ``folder``; each appears whole or not at all, the JSON last.

        Raises:
            UserError: the folder cannot be written.
        """
        written = _File(recipe=self.recipe, sites=dict(self.sites), caches=dict(self.caches), smoothed=self.smoothed)
        partial = folder / f".{TENSORS_NAME}.{os.getpid()}"
        partial.unlink(missing_ok=True)
        try:
            write_safetensors(partial, self.tensors)
            os.replace(partial, folder / TENSORS_NAME)
            text = folder / f".{PLAN_NAME}.{os.getpid()}"
            text.write_text(written.model_dump_json(indent=1) + "\n", encoding="utf-8")
            os.replace(text, folder / PLAN_NAME)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> QuantizationPlan:
        """The plan in ``folder``; tensors are read when they are used.

        Raises:
            UserError: there is none, or it is damaged or of a newer version.
        """
        path = folder / PLAN_NAME
        try:
            read = _File.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{path} is not a quantization plan that can be read; calibrate again") from error
        header = read_header(folder / TENSORS_NAME)
        tensors: dict[str, ir.TensorProtocol] = {}
        for name, stored in header.tensors.items():
            if stored.dtype not in _DTYPES:
                raise UserError(f"{header.path}: tensor {name!r} is {stored.dtype}; calibrate again")
            place = header.path.resolve()
            tensors[name] = ir.ExternalTensor(
                place, stored.offset, stored.length, _DTYPES[stored.dtype], shape=ir.Shape(stored.shape), name=name
            )
        return cls(read.recipe, read.sites, read.caches, read.smoothed, tensors)
