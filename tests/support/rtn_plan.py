"""Plans by the simplest method, largest magnitudes and round to nearest, which need no text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qwenforge.calibration.recipes import Recipe
from qwenforge.exporter import weights
from qwenforge.exporter.quantized_weights import as_quantized
from qwenforge.graph_passes.infra import set_weight, weight
from qwenforge.graph_passes.quantize.plan import QuantizationPlan, SitePlan
from qwenforge.graph_passes.quantize.sites import find_sites

_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


def rtn_plan(
    model: ir.Model, recipe: Recipe, *, change: Callable[[str, np.ndarray], np.ndarray] | None = None
) -> QuantizationPlan:
    """The plan of ``recipe``'s weights for a portable ``model``; ``change`` spoils scales, by the site's name."""
    found = find_sites(model)
    sites: dict[str, SitePlan] = {}
    tensors: dict[str, ir.TensorProtocol] = {}

    def add(name: str, kind: str, matrix: ir.TensorProtocol, plan: SitePlan) -> None:
        assert plan.weight is not None
        values = np.asarray(matrix.numpy(), np.float32)
        group = plan.group_size or values.shape[-1]
        columns = values.shape[-1]
        padded = np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, -columns % group)])
        largest = np.abs(padded.reshape(*values.shape[:-1], -1, group)).max(-1)
        scales = np.maximum(largest, 1e-8) / _LARGEST[plan.weight]
        scales = scales if change is None else change(name, scales)
        tensors[f"{name}.{kind}"] = ir.tensor(scales.astype(np.float32), name=f"{name}.{kind}")

    for name, site in found.linear.items():
        plan = recipe.choose(name, site.role).model_copy(update={"activation": None})
        sites[name] = plan
        if plan.weight is not None:
            add(name, "weight_scales", weights.transpose(site.weight, (1, 0)), plan)
    for name, experts in found.experts.items():
        plan = recipe.choose(name, "experts").model_copy(update={"activation": None})
        sites[name] = plan
        if plan.weight is not None:
            for kind, index in (("gate_up_scales", 2), ("down_scales", 3)):
                matrix = weight(experts.node.inputs[index])
                assert matrix is not None
                add(name, kind, matrix, plan)
    return QuantizationPlan(recipe.name, sites, {}, (), tensors)


def scale_wrongly(model: ir.Model, site_name: str, factor: float) -> None:
    """Leave the codes of a linear site as they are, beside scales ``factor`` times theirs."""
    site = find_sites(model).linear[site_name]
    found = as_quantized(weights.transpose(site.weight, (1, 0)))
    assert found is not None
    scales = ir.tensor(np.float32(factor) * np.asarray(found.scales.numpy(), np.float32), name="wrong_scales")
    wrong = replace(found, scales=scales).dequantized(site.weight.dtype)
    set_weight(model, site.node, 1, weights.transpose(wrong, (1, 0)))
