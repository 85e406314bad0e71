"""The scales of activations and caches that a quantized checkpoint brings, as a plan: nothing is calibrated.

The weights of such a checkpoint are codes and scales already, so that the plan says nothing of them. Modules that read
one value, such as q, k and v or gate and up, get one scale: the largest of theirs, as vLLM and TensorRT-LLM choose for
merged projections. With experts that is the largest of all experts' gates and ups for the tokens; each expert keeps its
own for its activated channels. Scales of a cache are one number each for a layer's keys (after rotation) and values.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.graph_passes.infra import static_dim
from qwenforge.graph_passes.quantize.plan import CachePlan, QuantizationPlan, SitePlan
from qwenforge.graph_passes.quantize.sites import CacheSite, Sites, find_sites
from qwenforge.manifest import CHECKPOINT_RECIPE

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
_INT8_EXPERTS = "the checkpoint's tokens are INT8, and experts take FP8 tokens or none"


def plan_from_checkpoint(checkpoint: Checkpoint, model: ir.Model) -> QuantizationPlan | None:
    """The plan for ``model``, the portable graph of ``checkpoint``; None where that brings no static scales.

    Raises:
        CheckpointError: a scale is missing.
    """
    found = checkpoint.quantized
    if found is None or (found.format.activation is None and found.format.cache is None):
        return None
    sites = find_sites(model)
    reader = _Scales(checkpoint)
    choices: dict[str, SitePlan] = {}
    tensors: dict[str, ir.TensorProtocol] = {}
    if (activation := found.format.activation) is not None:
        for name in sites.linear:
            if (scale := reader.shared(name)) is not None:
                choices[name] = SitePlan(weight=None, activation=activation)
                tensors[f"{name}.input_scale"] = ir.tensor(np.float32(scale))
        for name in sites.experts:
            if activation == "int8":
                choices[name] = SitePlan(weight=None, reason=_INT8_EXPERTS)
            elif (scales := reader.experts(name)) is not None:
                choices[name] = SitePlan(weight=None, activation=activation)
                tensors[f"{name}.activation_scales"] = ir.tensor(np.array(scales, np.float32))
    caches: dict[str, CachePlan] = {}
    if found.format.cache is not None:
        caches, scaled = _caches(checkpoint, sites)
        tensors |= scaled
    return QuantizationPlan(CHECKPOINT_RECIPE, choices, caches, (), tensors)


class _Scales:
    """Input scales by module."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        assert checkpoint.quantized is not None
        self._quantized = {matrix.module for matrix in checkpoint.quantized.matrices.values()}
        self._experts = checkpoint.config.num_experts

    def shared(self, site: str) -> float | None:
        """The scale of a linear site's input; None where one of its modules, or of those beside it, is not quantized.

        A scale for some readers of a value alone is as good as none: they would be computed apart.
        """
        parent, _, last = site.rpartition(".")
        beside = next((group for group in (_QKV, (*_GATE_UP, "gate_up_proj")) if last in group), (last,))
        return self._largest([f"{parent}.{module}" for module in beside if module != "gate_up_proj"])

    def experts(self, site: str) -> list[float] | None:
        """The scale of the tokens, then of each expert's activated channels."""
        each = [f"{site}.{index}" for index in range(self._experts)]
        tokens = self._largest([f"{expert}.{module}" for expert in each for module in _GATE_UP])
        activated = [self._largest([f"{expert}.down_proj"]) for expert in each]
        if tokens is None or any(scale is None for scale in activated):
            return None
        return [tokens, *(scale for scale in activated if scale is not None)]

    def _largest(self, modules: list[str]) -> float | None:
        if not self._quantized.issuperset(modules):
            return None
        return max(self._checkpoint.scale(f"{module}.input_scale") for module in modules)


def _caches(checkpoint: Checkpoint, sites: Sites) -> tuple[dict[str, CachePlan], dict[str, ir.TensorProtocol]]:
    assert checkpoint.quantized is not None and checkpoint.quantized.format.cache is not None
    plans: dict[str, CachePlan] = {}
    tensors: dict[str, ir.TensorProtocol] = {}
    for name, site in sites.caches.items():
        key, value = (checkpoint.scale(stored) for stored in checkpoint.quantized.cache_scales[site.layer])
        heads, size = _geometry(site)
        plans[name] = CachePlan(format=checkpoint.quantized.format.cache.format)
        tensors[f"{name}.key_scales"] = ir.tensor(np.full((heads, size), key, np.float32))
        tensors[f"{name}.value_scales"] = ir.tensor(np.full(heads, value, np.float32))
    return plans, tensors


def _geometry(site: CacheSite) -> tuple[int, int]:
    """Key/value heads and their size."""
    past = site.node.inputs[3]
    heads, size = static_dim(past, 1), static_dim(past, 3)
    if heads is None or size is None:
        raise RuntimeError(f"{site.name} is not of the portable form: its heads and their size are not static")
    return heads, size
