"""Lowerings of the portable form to a target's own operators, one target family a file.

``lowering_rules`` gives a target's rules; ``lower`` applies them to an export.
"""

from __future__ import annotations

import onnx_ir as ir

from qwenforge.errors import UnsupportedError
from qwenforge.graph_passes.infra import FusionPass


def lowering_rules(target: str, *, weights: str = "copy") -> list[FusionPass]:
    """The rules that follow the portable ones for ``target``, in order; none for ``portable``.

    Args:
        target: ``portable`` or ``ort-cpu``.
        weights: ``link`` leaves every weight matrix as the checkpoint stores it, so that its bytes can be referred to.

    Raises:
        UnsupportedError: there is no lowering for ``target``.
    """
    if target == "portable":
        return []
    if target == "ort-cpu":
        from qwenforge.graph_passes.lower.ort_cpu import ort_cpu_rules

        return ort_cpu_rules(weights=weights)
    from qwenforge import targets

    targets.get(target)
    raise UnsupportedError(f"there is no lowering for target {target}; use portable or ort-cpu.")


def lower(model: ir.Model, target: str, *, weights: str = "copy") -> ir.Model:
    """Lower a portable model in place and return it; dead nodes, functions and initializers are dropped."""
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

    for rule in lowering_rules(target, weights=weights):
        rule(model)
        RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return model
