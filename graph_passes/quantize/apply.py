"""A quantization plan applied to a portable model: the fake-quantized form, which every runtime can still run.

In this order: smoothing; each quantized matrix becomes the dequantization of its codes, a lazy floating-point weight
like any other that lowerings take apart again (:func:`~qwenforge.exporter.quantized_weights.as_quantized`); a
QuantizeLinear and a DequantizeLinear in front of each product whose input is quantized; experts with quantized tokens
and caches of 8 bits become calls of the quantized functions.

Scales are rounded to the model's dtype before they are used, because strongly typed networks hold them in it: codes
times scales are then the same numbers in every form of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.exporter import weights
from qwenforge.exporter.quantized_weights import CODE_DTYPES, QuantizedWeight, WeightFormat, quantize
from qwenforge.exporter.transforms import RoundScales
from qwenforge.graph_passes.infra import set_weight, weight
from qwenforge.graph_passes.quantize.activations import QuantizedInput, quantize_inputs
from qwenforge.graph_passes.quantize.expert_weights import each_expert
from qwenforge.graph_passes.quantize.experts_and_caches import quantize_cache, quantize_tokens
from qwenforge.graph_passes.quantize.plan import QuantizationPlan, SitePlan
from qwenforge.graph_passes.quantize.sites import ExpertSite, LinearSite, Sites, find_sites
from qwenforge.graph_passes.quantize.smoothing import smooth


def apply_plan(model: ir.Model, plan: QuantizationPlan) -> None:
    """Quantize ``model``, a portable model of any depth with lazy weights, as ``plan`` says, in place.

    Nothing but scales of activations and smoothing factors is read; weights are read when they are written.

    Raises:
        GraphError: the plan names what the graph does not have, or its numbers do not fit the graph.
    """
    sites = find_sites(model)
    _require_known(sites, plan)
    for name in plan.smoothed:
        smooth(model, sites, name, _numbers(plan, f"{name}.smoothing"))
    inputs: list[QuantizedInput] = []
    for name, choice in plan.sites.items():
        if name in sites.linear:
            site = sites.linear[name]
            _quantize_linear(model, site, choice, plan)
            if choice.activation is not None:
                inputs.append(QuantizedInput(site.node, choice.activation, _scale(plan, f"{name}.input_scale")))
        else:
            _quantize_experts(model, sites.experts[name], choice, plan)
    quantize_inputs(model, inputs)
    for name, cache in plan.caches.items():
        scales = [_numbers(plan, f"{name}.{kind}_scales") for kind in ("key", "value")]
        quantize_cache(model, sites.caches[name], cache.format, *scales)


def _require_known(sites: Sites, plan: QuantizationPlan) -> None:
    unknown = [name for name in plan.sites if name not in sites.linear and name not in sites.experts]
    unknown += [name for name in plan.caches if name not in sites.caches]
    if unknown:
        raise GraphError(
            f"the plan quantizes {unknown[0]}, which the graph does not have; calibrate this graph itself."
        )


def _quantize_linear(model: ir.Model, site: LinearSite, choice: SitePlan, plan: QuantizationPlan) -> None:
    if choice.weight is None:
        return
    tensor = site.weight
    quantized = _quantized(site.name, "weight", weights.transpose(tensor, (1, 0)), choice, plan, tensor.dtype)
    set_weight(model, site.node, 1, weights.transpose(quantized.dequantized(tensor.dtype), (1, 0)))


def _quantize_experts(model: ir.Model, site: ExpertSite, choice: SitePlan, plan: QuantizationPlan) -> None:
    if choice.activation == "int8":
        raise GraphError(f"the plan quantizes the tokens of {site.name} to INT8; experts take FP8 tokens or none.")
    if choice.activation is not None:
        quantize_tokens(model, site, _numbers(plan, f"{site.name}.activation_scales"))
    if choice.weight is None:
        return
    for index, part in ((2, "gate_up"), (3, "down")):
        stacked = weight(site.node.inputs[index])
        if stacked is None:
            raise GraphError(f"the weights of {site.name} are not constants; they cannot be quantized.")
        quantized = _Expert(site.name, part, choice, plan, stacked.dtype)
        set_weight(model, site.node, index, each_expert(stacked, quantized))


@dataclass(frozen=True)
class _Expert:
    """Quantizes one expert's matrix after the other."""

    site: str
    part: str
    choice: SitePlan
    plan: QuantizationPlan
    dtype: ir.DataType

    def __call__(self, matrix: ir.TensorProtocol, number: int) -> ir.TensorProtocol:
        found = _quantized(self.site, self.part, matrix, self.choice, self.plan, self.dtype, expert=number)
        return found.dequantized(self.dtype)


def _quantized(
    site: str,
    part: str,
    matrix: ir.TensorProtocol,
    choice: SitePlan,
    plan: QuantizationPlan,
    dtype: ir.DataType,
    *,
    expert: int | None = None,
) -> QuantizedWeight:
    """The codes and scales of ``matrix`` [N, K]: one of ``expert``s, or a linear site's."""
    assert choice.weight is not None
    rows, columns = weights.dims(matrix)
    group = choice.group_size or columns
    groups = [rows, math.ceil(columns / group)]

    def planned(kind: str, shape: Sequence[int]) -> ir.TensorProtocol | None:
        name = f"{site}.{part}_{kind}"
        tensor = plan.tensors.get(name)
        if tensor is None:
            return None
        found = weights.dims(tensor)
        if tuple(found if expert is None else found[1:]) != tuple(shape) or (expert is not None and expert >= found[0]):
            wanted = list(shape) if expert is None else ["experts", *shape]
            raise GraphError(f"{name} of the plan is {list(found)} and the graph wants {wanted}; calibrate again.")
        if expert is None:
            return tensor
        return weights.reshape(weights.slice_(tensor, 0, expert, expert + 1), shape)

    scales = planned("scales", groups)
    if scales is None:
        raise GraphError(f"the plan quantizes {site} and has no {site}.{part}_scales; calibrate again.")
    rounded = weights.DerivedTensor(RoundScales(dtype), [scales])
    points = _typed(planned("zero_points", groups), choice.weight)
    codes = planned("codes", (rows, columns))
    if codes is None:
        return quantize(matrix, choice.weight, rounded, group_size=group, zero_points=points)
    typed = _typed(codes, choice.weight)
    assert typed is not None
    return QuantizedWeight(typed, rounded, points, group)


def _typed(numbers: ir.TensorProtocol | None, weight_format: WeightFormat) -> ir.TensorProtocol | None:
    return None if numbers is None else weights.cast(numbers, CODE_DTYPES[weight_format])


def _numbers(plan: QuantizationPlan, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    tensor = plan.tensors.get(name)
    if tensor is None:
        raise GraphError(f"the plan has no {name}; calibrate again.")
    return np.asarray(tensor.numpy(), dtype=np.float32)


def _scale(plan: QuantizationPlan, name: str) -> float:
    numbers = _numbers(plan, name)
    if numbers.size != 1 or not np.isfinite(numbers).all() or not (numbers > 0).all():
        raise GraphError(f"{name} of the plan is not one positive number; calibrate again.")
    return float(numbers.reshape(()))
