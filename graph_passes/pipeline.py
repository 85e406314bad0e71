"""The order of the passes, and the loop that applies them one by one, verified if asked.

``optimize`` takes anybody's graph: it is inlined, brought to opset 24 and folded by onnx_ir's and onnxscript's own
passes, fused to the portable form rule by rule, and lowered to the target. Each rule works on a copy, so that a rewrite
that verification refuses is simply not taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from qwenforge.errors import GraphError, UserError
from qwenforge.exporter.checkpoint import CheckpointTensor
from qwenforge.graph_passes.infra import FusionPass

if TYPE_CHECKING:
    from qwenforge.graph_passes.scenario import Skipped
    from qwenforge.graph_passes.verify import Verifier
    from qwenforge.lowering_choice import LoweringChoice

OPSET = 24
OLDEST_OPSET = 18
_LARGE = 1024

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """What one rule did.

    Attributes:
        rule: its name.
        matches: rewrites it made.
        nodes_before, nodes_after: nodes of the graph around it.
        error: largest output difference relative to its bound's scale; None when not verified.
        accepted: whether its rewrite was taken over.
        reason: why not, or why look-alikes were left alone.
    """

    rule: str
    matches: int
    nodes_before: int
    nodes_after: int
    error: float | None = None
    accepted: bool = True
    reason: str = ""


@dataclass(frozen=True)
class PipelineResult:
    """The rewritten model, the story of its rules and the scenarios that verification could not run."""

    model: ir.Model
    steps: list[Step] = field(default_factory=list)
    skipped: tuple[Skipped, ...] = ()

    @property
    def refused(self) -> list[Step]:
        """Rules whose rewrite was not taken over."""
        return [step for step in self.steps if not step.accepted]


def portable_rules(positions: int) -> list[FusionPass]:
    """The rules that lead to the portable form, in order.

    Args:
        positions: rows of the rotary tables, one for each position the model may see.
    """
    from qwenforge.graph_passes.fuse.attention import FuseGroupedQueryAttention
    from qwenforge.graph_passes.fuse.batch_size import BatchSizeFromTokens
    from qwenforge.graph_passes.fuse.fold_weight_transforms import FoldWeightTransforms
    from qwenforge.graph_passes.fuse.linear import GemmToMatMul
    from qwenforge.graph_passes.fuse.logits import SelectLogits
    from qwenforge.graph_passes.fuse.moe_routing import FuseMixtureOfExperts
    from qwenforge.graph_passes.fuse.portable_signature import PortableSignature
    from qwenforge.graph_passes.fuse.reshapes import SimplifyReshapes
    from qwenforge.graph_passes.fuse.rms_norm import FuseRMSNorm
    from qwenforge.graph_passes.fuse.rope import FuseRotaryEmbedding
    from qwenforge.graph_passes.fuse.swiglu import FuseSwiGLU

    return [
        BatchSizeFromTokens(),
        GemmToMatMul(),
        # Before weights are folded: sorted experts are told by the Split of their stacked weights.
        FuseMixtureOfExperts(),
        FoldWeightTransforms(),
        FuseRMSNorm(),
        FuseRotaryEmbedding(positions),
        FuseGroupedQueryAttention(),
        SimplifyReshapes(),
        FuseSwiGLU(),
        SelectLogits(),
        PortableSignature(),
    ]


def optimize(
    model: ir.Model,
    *,
    target: str = "portable",
    verify: bool = False,
    disable: Collection[str] = (),
    positions: int | None = None,
    extra_rules: Sequence[FusionPass] = (),
    choice: LoweringChoice | None = None,
    capacity: int | None = None,
    progress: Progress | None = None,
) -> PipelineResult:
    """Fuse ``model`` to the portable form and lower it to ``target``.

    Args:
        model: any opset 18..24 graph of a Qwen2-family model; it is not changed.
        target: one of ``qwenforge.targets``.
        verify: compare the outputs before and after every rule and refuse a rule that moves them.
        disable: names of rules to leave out.
        positions: rows of the rotary tables; by default as :data:`fuse.rope.DEFAULT_POSITIONS`.
        extra_rules: further rules, run after the portable ones.
        choice: how to lower for TensorRT, needed for its targets, or for ONNX Runtime on CUDA.
        capacity: the static size of the caches for TensorRT; None leaves it symbolic.
        progress: called with each rule's name before it runs.

    Raises:
        GraphError: the graph cannot be prepared, or ``target`` needs a form that the rules did not reach.
        UserError: a name in ``disable`` or ``target`` is unknown.
    """
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass

    from qwenforge.graph_passes.fuse.rope import DEFAULT_POSITIONS
    from qwenforge.graph_passes.lower import lowering_rules

    rules = [*portable_rules(positions or DEFAULT_POSITIONS), *extra_rules]
    rules += lowering_rules(target, choice=choice, capacity=capacity)
    unknown = set(disable) - {rule.name for rule in rules}
    if unknown:
        known = ", ".join(rule.name for rule in rules)
        raise UserError(f"no rule is called {', '.join(sorted(unknown))}; the rules are {known}.")
    current = prepare(model)
    verifier = None
    if verify:
        from qwenforge.graph_passes.verify import Verifier

        verifier = Verifier(current)
    steps = []
    for rule in rules:
        if rule.name in disable:
            continue
        if progress is not None:
            progress(rule.name)
        current, step = _apply(rule, current, verifier)
        steps.append(step)
    RemoveUnusedFunctionsPass()(current)  # type: ignore[no-untyped-call]
    return PipelineResult(current, steps, tuple(verifier.skipped) if verifier is not None else ())


def _apply(rule: FusionPass, current: ir.Model, verifier: Verifier | None) -> tuple[ir.Model, Step]:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    before = current.graph.num_nodes()
    candidate = current.clone()
    try:
        rule(candidate)
    except (GraphError, AssertionError) as error:
        return current, Step(rule.name, 0, before, before, accepted=False, reason=f"{error}")
    if rule.matches == 0:
        return current, Step(rule.name, 0, before, before, reason="; ".join(dict.fromkeys(rule.failures)))
    RemoveUnusedNodesPass()(candidate)
    after = candidate.graph.num_nodes()
    reason = "; ".join(dict.fromkeys(rule.failures))
    if verifier is None:
        return candidate, Step(rule.name, rule.matches, before, after, reason=reason)
    outcome = verifier.check(candidate)
    if not outcome.ok:
        return current, Step(rule.name, rule.matches, before, before, outcome.error, False, outcome.summary())
    return candidate, Step(rule.name, rule.matches, before, after, outcome.error, True, reason)


def prepare(model: ir.Model) -> ir.Model:
    """A copy of ``model`` at opset 24, functions inlined, small constants folded, duplicates and dead nodes gone.

    Raises:
        GraphError: the opset is outside 18..24, or the graph has control flow.
    """
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

    opset = model.graph.opset_imports.get("", 0)
    if not OLDEST_OPSET <= opset <= OPSET:
        raise GraphError(f"the graph is of opset {opset}; export it with an opset from {OLDEST_OPSET} to {OPSET}.")
    copy = model.clone()
    _read_numeric_dimensions(copy)
    _fold(copy)
    _raise_opset(copy)
    CommonSubexpressionEliminationPass()(copy)
    RemoveUnusedNodesPass()(copy)
    return copy


def _read_numeric_dimensions(model: ir.Model) -> None:
    """Make numbers of dimensions that an exporter wrote as symbols called "2" or "8"."""
    outputs = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *outputs):
        if value.shape is None:
            continue
        written = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
        if any(isinstance(dim, str) and dim.isdecimal() for dim in written):
            value.shape = ir.Shape([int(d) if isinstance(d, str) and d.isdecimal() else d for d in written])


def _raise_opset(model: ir.Model) -> None:
    """Declare opset 24: every operator the exporters emit means the same from 18 on, once defaults are spelled out."""
    model.graph.opset_imports[""] = OPSET
    model.ir_version = max(model.ir_version or 10, 11)


def _fold(model: ir.Model) -> None:
    """Fold constants without ever reading a weight: weights are hidden from the folder meanwhile.

    A checkpoint's tensor is one whatever its size: folded into a constant, or shared with one that happens to be equal,
    it would lose the name by which other layers find theirs. In a foreign graph a weight is what is large.
    """
    import logging

    import onnxscript.optimizer

    hidden: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and (tensor.size > _LARGE or isinstance(tensor, CheckpointTensor)):
            hidden.append((value, tensor))
            value.const_value = None
    kept = {value.name: tensor for value, tensor in hidden}
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # onnx_ir warns about each hidden initializer
    try:
        onnxscript.optimizer.optimize_ir(model, inline=True)
    finally:
        logging.disable(previous)
        for value in model.graph.initializers.values():
            if value.const_value is None:
                value.const_value = kept[value.name]
