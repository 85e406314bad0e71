"""Where a layer can be smoothed: the names that plans use, and the sites that read what is smoothed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.exporter import weights
from qwenforge.graph_passes.infra import int_attribute, is_op
from qwenforge.graph_passes.quantize.sites import LinearSite, Sites
from qwenforge.graph_passes.quantize.smoothing import smooth

Array = npt.NDArray[Any]
Kind = Literal["norm", "values", "gated", "experts"]


@dataclass(frozen=True)
class Place:
    """One place.

    Attributes:
        name: of the norm or the site whose input is smoothed.
        kind: what is divided: a norm's weight, the rows of v_proj, the rows of up, or of every expert's up.
        readers: the linear sites that read it.
        experts: the expert site that reads it.
        repeats: how many input channels share a factor: query heads of a key head, in ``values``; else 1.
        head_size: of ``values``.
        divides: the linear site whose rows are divided, and the first of those rows; None for norms and experts.
    """

    name: str
    kind: Kind
    readers: tuple[str, ...]
    experts: str | None = None
    repeats: int = 1
    head_size: int = 1
    divides: tuple[str, int] | None = None

    def shared(self, channels: Array, combine: np.ufunc) -> Array:
        """Numbers of input channels [K] as numbers of factors, those that share one combined by a ufunc."""
        if self.kind != "values":
            return channels
        by_head = channels.reshape(-1, self.repeats, self.head_size)
        combined: Array = combine.reduce(by_head, axis=1).reshape(-1)
        return combined / self.repeats if combine is np.add else combined

    def spread(self, factors: Array) -> Array:
        """Factors as numbers of input channels [K]."""
        if self.kind != "values":
            return factors
        by_head = np.repeat(factors.reshape(-1, 1, self.head_size), self.repeats, axis=1)
        return by_head.reshape(-1)


def find_places(model: ir.Model, sites: Sites, layer: int) -> tuple[list[Place], list[str]]:
    """The places of a layer that can be smoothed, and why others cannot."""
    linear = [site for site in sites.linear.values() if site.layer == layer]
    experts = next((site for site in sites.experts.values() if site.layer == layer), None)
    scope = f"model.layers.{layer}"
    found = [Place(f"{scope}.input_layernorm", "norm", _names(linear, "qkv"))]
    attention = next(site.node for site in sites.caches.values() if site.layer == layer)
    heads, key_heads = (int_attribute(attention, kind, 0) for kind in ("num_heads", "num_key_value_heads"))
    for site in linear:
        if site.role == "attention_output":
            head_size = weights.dims(site.weight)[0] // heads
            divided = (f"{scope}.self_attn.v_proj", 0)
            found.append(Place(site.name, "values", (site.name,), None, heads // key_heads, head_size, divided))
    fed = (*_names(linear, "mlp_input"), *_names(linear, "router"), *_names(linear, "shared_gate"))
    name = f"{scope}.post_attention_layernorm"
    found.append(Place(name, "norm", fed, experts.name if experts is not None else None))
    for site in linear:
        if site.role == "mlp_output":
            found.append(Place(site.name, "gated", (site.name,), divides=_rows_of_up(site, linear)))
    if experts is not None:
        found.append(Place(experts.name, "experts", (), experts.name))
    return _legal(model, sites, found)


def _names(linear: list[LinearSite], role: str) -> tuple[str, ...]:
    return tuple(site.name for site in linear if site.role == role)


def _rows_of_up(site: LinearSite, linear: list[LinearSite]) -> tuple[str, int] | None:
    """The site that makes up, which down_proj's input is a product with, and up's first row in it."""
    gated = is_op(site.node.inputs[0], "Mul")
    for value in gated.inputs if gated is not None else ():
        split = is_op(value, "Split")
        made = split.inputs[0] if split is not None else value
        product = is_op(made, "MatMul")
        for each in linear:
            if each.node is product and value is not None:
                width = weights.dims(site.weight)[0]
                return each.name, width * (value.index() or 0) if split is not None else 0
    return None


def _legal(model: ir.Model, sites: Sites, places: list[Place]) -> tuple[list[Place], list[str]]:
    """Those that the graph pass would apply: it is asked, with factors of 1, on a copy of the graph."""
    kept, reasons = [], []
    for place in places:
        if (not place.readers and place.experts is None) or (place.kind == "gated" and place.divides is None):
            continue
        try:
            smooth(model, sites, place.name, np.ones(_factors(sites, place), np.float32))
        except GraphError as error:
            reasons.append(str(error))
        else:
            kept.append(place)
    return kept, reasons


def _factors(sites: Sites, place: Place) -> tuple[int, ...]:
    if place.kind == "experts":
        tensor = sites.experts[place.name].node.inputs[3]
        assert tensor is not None and tensor.const_value is not None
        experts, _, width = weights.dims(tensor.const_value)
        return (experts, width)
    if place.readers:
        return (weights.dims(sites.linear[place.readers[0]].weight)[0] // place.repeats,)
    assert place.experts is not None
    tensor = sites.experts[place.experts].node.inputs[2]
    assert tensor is not None and tensor.const_value is not None
    return (weights.dims(tensor.const_value)[2],)
