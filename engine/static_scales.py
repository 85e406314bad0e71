"""The static scales of activations and caches that a quantized checkpoint brings, in an export.

    portable model of weights alone, verified -> usable scales applied -> (lowered and written) -> judged

The comparison with transformers is of the weights alone, because transformers rounds no activations. What the scales
change is measured on held-out text against that model, and held to a budget like a recipe's: a scale that belongs to
another layer or means something else is as wrong as a wrong weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from qwenforge.calibration.budget import Budget, default_budget, parse_budget
from qwenforge.calibration.heldout import HeldOutText, load_heldout
from qwenforge.engine.accuracy_report import described, recorded_accuracy, recorded_sites
from qwenforge.engine.accuracy_run import AccuracyRun, measure
from qwenforge.engine.verification import fits_whole
from qwenforge.errors import AccuracyError, UserError
from qwenforge.exporter import weights
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.external_data import save_model
from qwenforge.exporter.quantized_weights import as_quantized
from qwenforge.graph_passes.infra import weight
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.quantize.apply import apply_plan
from qwenforge.graph_passes.quantize.from_checkpoint import plan_from_checkpoint
from qwenforge.graph_passes.quantize.plan import QuantizationPlan, SitePlan
from qwenforge.graph_passes.quantize.sites import find_sites
from qwenforge.lowering_choice import LoweringChoice
from qwenforge.manifest import CHECKPOINT_RECIPE, MODEL_NAME, QuantizationRecord
from qwenforge.ort_cuda_choice import ORT_CUDA

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, 0..1."""


@dataclass(frozen=True)
class ScalesRequest:
    """What is to become of a checkpoint's static scales.

    Attributes:
        apply: put them into the graph where the target can use them; False leaves activations and caches as they are.
        budget: limits as ``--budget`` takes them; what it leaves out, and None, is the default for the formats.
        heldout_data: text to judge by; None for the built-in held-out sample.
    """

    apply: bool = True
    budget: str | None = None
    heldout_data: Path | None = None


@dataclass(frozen=True)
class UsableScales:
    """What of a checkpoint's scales is applied: ``plan``, None for nothing; ``left_out`` says what is not and why."""

    plan: QuantizationPlan | None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScalesOutcome:
    """What applying the scales did.

    Attributes:
        plan: the scales applied.
        run: how far the result is from the same model with unquantized activations and caches.
        budget: what that is held to.
    """

    plan: QuantizationPlan
    run: AccuracyRun
    budget: Budget

    @property
    def applied(self) -> str:
        """What was applied, in a few words."""
        inputs = Counter(site.activation for site in self.plan.sites.values() if site.activation is not None)
        caches = Counter(cache.format for cache in self.plan.caches.values())
        parts = [f"{kind} inputs of {count} products or experts" for kind, count in inputs.items()]
        parts += [f"an {kind} cache in {count} layers" for kind, count in caches.items()]
        return " and ".join(parts)

    def require_budget(self) -> None:
        """Raise AccuracyError, with the worst layers in the message, when the budget is missed."""
        missed = self.budget.missed(self.run.distributions)
        if not missed:
            return
        worst = ", ".join(described(layer) for layer in self.run.worst())
        raise AccuracyError(
            f"the checkpoint's static scales ({self.applied}) miss the budget on {self.run.windows} windows of "
            f"{self.run.source}: {'; '.join(missed)}; the worst layers are {worst}; no bundle was written; leave "
            "activations and caches as they are with --static-scales ignore, or allow more with --budget."
        )

    def to_json(self) -> dict[str, Any]:
        """The report; ``accuracy.json`` holds it under ``static_scales``."""
        run = self.run
        return {
            "applied": self.applied,
            "inputs": {name: site.activation for name, site in self.plan.sites.items() if site.activation is not None},
            "caches": {name: cache.format for name, cache in self.plan.caches.items()},
            "held_out": {"text": run.source, "windows": run.windows, "tokens_in_window": run.window_tokens},
            "method": run.method,
            "accuracy": run.distributions.to_json(),
            "budget": self.budget.to_json(),
            "layers": [layer.to_json() for layer in run.layers],
            "worst_layers": [layer.name for layer in run.worst()],
        }


def require_scales(checkpoint: Checkpoint, request: ScalesRequest) -> None:
    """Refuse arguments about static scales where there are none, or none to judge.

    Raises:
        UserError: ``checkpoint`` brings no static scales, or they are not to be applied.
    """
    found = checkpoint.quantized
    brings = found is not None and (found.format.activation is not None or found.format.cache is not None)
    if not request.apply and not brings:
        raise UserError(
            f"--static-scales ignore is for checkpoints with such scales, and {checkpoint.folder} has none."
        )
    given = [("--budget", request.budget), ("--heldout-data", request.heldout_data)]
    option = next((name for name, value in given if value is not None), None)
    if option is not None and not brings:
        raise UserError(
            f"{option} goes with --quantize RECIPE, or with static scales of activations or caches in the checkpoint, "
            f"and {checkpoint.folder} has none; leave it out."
        )
    if option is not None and (checkpoint.is_widened or not request.apply):
        raise UserError(f"{option} judges the checkpoint's static scales, which are not to be applied; leave it out.")


def usable_scales(
    checkpoint: Checkpoint,
    model: ir.Model,
    request: ScalesRequest,
    *,
    target: str,
    dtype: ir.DataType,
    choice: LoweringChoice | None,
) -> UsableScales:
    """Which scales of ``checkpoint`` an export of its portable ``model`` for ``target`` applies.

    Raises:
        CheckpointError: a scale is missing or no positive number.
    """
    plan = plan_from_checkpoint(checkpoint, model)
    if plan is None:
        return UsableScales(None)
    activations = sorted({site.activation for site in plan.sites.values() if site.activation is not None})
    caches = sorted({cache.format for cache in plan.caches.values()})
    left_out: list[str] = []

    def leave(what: str, why: str) -> None:
        left_out.append(f"the checkpoint's static scales of {what} are not used: {why}.")

    if checkpoint.is_widened or not request.apply:
        option = "--dequantize" if checkpoint.is_widened else "--static-scales ignore"
        leave(_all_of(activations, caches), f"{option} leaves both in the model's dtype")
        return UsableScales(None, tuple(left_out))
    sites, kept = plan.sites, plan.caches
    if activations and (why := _no_activations(target, activations[0], dtype)):
        leave(f"{activations[0]} activations", why)
        sites = {}
    elif reasons := [site.reason for site in sites.values() if site.reason]:
        leave(f"the tokens of experts in {len(reasons)} layers", reasons[0])
        sites = {name: site for name, site in sites.items() if not site.reason}
    if caches and (why := _no_cache(target, caches[0], choice)):
        leave(f"{caches[0]} caches", why)
        kept = {}
    usable = replace(plan, sites=sites, caches=kept) if sites or kept else None
    return UsableScales(usable, tuple(left_out))


def _all_of(activations: Sequence[str], caches: Sequence[str]) -> str:
    parts = [f"{kind} activations" for kind in activations] + [f"{kind} caches" for kind in caches]
    return " and ".join(parts)


def _no_activations(target: str, kind: str, dtype: ir.DataType) -> str | None:
    """Why ``target`` cannot multiply activations of ``kind``; None where it can."""
    if target == "ort-cpu" and kind == "fp8":
        return "ONNX Runtime has no FP8 product on a CPU; --target tensorrt has"
    if target == "ort-cpu" and dtype != ir.DataType.FLOAT:
        return "ONNX Runtime multiplies INT8 by INT8 on a CPU in fp32 models only; --dtype fp32 uses them"
    if target == ORT_CUDA:
        return "ONNX Runtime on CUDA multiplies no quantized activations; --target tensorrt does"
    return None


def _no_cache(target: str, kind: str, choice: LoweringChoice | None) -> str | None:
    """Why ``target`` cannot hold a cache of ``kind``; None where it can."""
    if target == "ort-cpu":
        return "ONNX Runtime has no 8-bit cache on a CPU; --target tensorrt --attention plugin has"
    if choice is None:
        return None
    if choice.attention == "native":
        return "8-bit caches are of our own attention; add --attention plugin"
    if choice.device is not None and kind not in choice.device.precisions:
        return f"{choice.device.name} has no {kind.upper()} arithmetic"
    return None


@dataclass
class ScaledExport:
    """One export that applies ``plan``, in steps: save, apply, judge.

    Attributes:
        source: the checkpoint.
        plan: the scales to apply.
        request: the budget and the text.
        dtype: the model's.
        max_length: the bundle's context.
        folder: holds the model of weights alone.
        progress: told what is going on.
    """

    source: Checkpoint
    plan: QuantizationPlan
    request: ScalesRequest
    dtype: ir.DataType
    max_length: int
    folder: Path
    progress: Progress
    text: HeldOutText = field(init=False)
    budget: Budget = field(init=False)

    def __post_init__(self) -> None:
        assert self.source.quantized is not None
        kinds = {site.activation for site in self.plan.sites.values()} - {None}
        default = default_budget(
            self.source.quantized.format.weight_format if kinds else None,
            activations=bool(kinds),
            cache=bool(self.plan.caches),
        )
        self.budget = default if self.request.budget is None else parse_budget(self.request.budget, default)
        # Before the model is written and verified, not after.
        self.text = load_heldout(
            self.request.heldout_data,
            self.source.tokenizer_files,
            vocab_size=self.source.config.vocab_size,
            max_length=self.max_length,
        )

    def save_weights_alone(self, model: ir.Model) -> Path:
        """Write the portable ``model``, its scales not applied, and return its file.

        Its weights are codes there: dequantized they would be rounded to the model's dtype once more.
        """
        path = self.folder / MODEL_NAME
        save_model(
            lower(model, "portable"),
            path,
            progress=lambda done, total, name: self.progress(f"write weights alone: {name}", done / max(1, total)),
        )
        return path

    def applied(self, model: ir.Model) -> ir.Model:
        """``model``, a portable one, with the scales applied in place."""
        apply_plan(model, self.plan)
        return model

    def judge(self, lowered: Path, applied: ir.Model, session_options: Mapping[str, str]) -> ScalesOutcome:
        """Compare the ``lowered`` graph beside its data, and layer by layer ``applied``, with the weights alone.

        Raises:
            VerificationError: a logit is not finite.
            AccuracyError: the budget is missed.
        """
        with TemporaryDirectory(prefix="pieces-", dir=self.folder) as pieces:
            run = measure(
                self.folder / MODEL_NAME,
                [lowered],
                applied,
                self.text,
                whole=fits_whole(self.source),
                upcast_reference=self.dtype != ir.DataType.FLOAT,
                # ONNX Runtime has no bf16 kernels on the CPU; in fp16 the model runs as it will.
                upcast_quantized=self.dtype == ir.DataType.BFLOAT16,
                session_options=session_options,
                work_folder=Path(pieces),
                progress=self.progress,
            )
        outcome = ScalesOutcome(self.plan, run, self.budget)
        outcome.require_budget()
        return outcome


def checkpoint_record(model: ir.Model, plan: QuantizationPlan | None) -> QuantizationRecord:
    """The manifest's part for a checkpoint that was quantized already; :func:`judged_record` adds what was measured.

    Args:
        model: the portable model, before ``plan`` is applied and before it is lowered.
        plan: the scales that the bundle applies; None for none.
    """
    counts: Counter[tuple[str, int | None, str | None]] = Counter()
    sites: Mapping[str, SitePlan] = plan.sites if plan is not None else {}
    for name, stored in _matrices(model).items():
        found = as_quantized(stored)
        weight_format = found.format if found is not None else "kept"
        whole_rows = found is None or found.group_size >= weights.dims(stored)[-1]
        group = None if found is None or whole_rows else found.group_size
        counts[weight_format, group, sites[name].activation if name in sites else None] += 1
    caches = {cache.format for cache in plan.caches.values()} if plan is not None else set()
    return QuantizationRecord(
        recipe=CHECKPOINT_RECIPE,
        sites=recorded_sites(counts),
        cache=caches.pop() if len(caches) == 1 else None,
        calibrated_on=None,
        judged_on=None,
        budget={},
        accuracy={},
    )


def judged_record(record: QuantizationRecord, outcome: ScalesOutcome) -> QuantizationRecord:
    """``record`` with what was measured."""
    measured = recorded_accuracy(outcome.run.distributions)
    return record.model_copy(
        update={"judged_on": outcome.run.source, "budget": outcome.budget.to_json(), "accuracy": measured}
    )


def _matrices(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The weights [.., N, K] of all sites; of experts, those of gate and up."""
    sites = find_sites(model)
    found = {name: weights.transpose(site.weight, (1, 0)) for name, site in sites.linear.items()}
    for name, site in sites.experts.items():
        stacked = weight(site.node.inputs[2])
        assert stacked is not None
        found[name] = stacked
    return found
