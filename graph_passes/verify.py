"""Is a rewritten graph still the same function? Run both on the same seeded scenarios and compare.

The bounds are relative to the largest magnitude of the reference output. Two runs decide for a 16-bit graph: upcast to
fp32, where only a wrong rewrite and not a rounding can move the outputs, and, in fp16, as it is, where a rewrite that
computes in a narrower type than before (an overflow, a lost cast) shows. ONNX Runtime has no bf16 kernels on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qwenforge.errors import GraphError, VerificationError
from qwenforge.graph_passes.execution import Array, Executable, half_types
from qwenforge.graph_passes.scenario import (
    CaseData,
    Geometry,
    Skipped,
    draw,
    feeds,
    geometry,
    output_names,
    readings,
    scenarios_for,
)
from qwenforge.graph_passes.signature import Signature, detect_signature

FLOAT32_BOUND = 2e-4
"""fp32: reordered sums of a few thousand terms through tens of layers differ by about 1e-5; ten times that."""
FLOAT16_BOUND = 5e-2
"""fp16 as it is: the root mean square error, because a rounding may choose another expert for a single token."""


@dataclass(frozen=True)
class Check:
    """One output of one scenario: ``error`` is absolute and allowed up to ``bound * scale``."""

    scenario: str
    output: str
    precision: str
    error: float
    scale: float
    bound: float

    @property
    def relative(self) -> float:
        """The error in units of the reference's scale."""
        return self.error / self.scale

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound (a NaN is not)."""
        return self.relative <= self.bound


@dataclass(frozen=True)
class Verification:
    """The outcome of comparing two graphs.

    Attributes:
        checks: every comparison made.
        skipped: scenarios that the reference graph cannot express or run.
        failure: why the rewritten graph could not be compared at all; empty if it was.
    """

    checks: tuple[Check, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything was compared and lies within its bound."""
        return not self.failure and bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def worst(self) -> Check | None:
        """The comparison that comes closest to its bound or lies farthest beyond it."""
        return max(self.checks, key=lambda check: _sortable(check.relative / check.bound), default=None)

    @property
    def error(self) -> float | None:
        """The largest difference relative to the reference's scale, of the fp32 runs; None when nothing was run."""
        return max((_sortable(check.relative) for check in self.checks if check.precision == "fp32"), default=None)

    def summary(self) -> str:
        """One sentence."""
        if self.failure:
            return self.failure
        worst = self.worst
        if worst is None:
            return "nothing was compared"
        relation = "within" if self.ok else "beyond"
        return (
            f"{worst.output} moves by {worst.relative:.1e} of its scale in '{worst.scenario}' ({worst.precision}), "
            f"{relation} the bound of {worst.bound:.0e}"
        )


def _sortable(number: float) -> float:
    return math.inf if math.isnan(number) else number


def verify_rewrite(before: ir.Model, after: ir.Model, *, seed: int = 0, tolerance: float | None = None) -> Verification:
    """Compare ``after`` with ``before`` on seeded scenarios; see :class:`Verifier`."""
    return Verifier(before, seed=seed, tolerance=tolerance).check(after)


def inexpressible_scenarios(model: ir.Model) -> tuple[Skipped, ...]:
    """The scenarios that ``model``'s inputs cannot express: what a verification of its rewrites does not cover.

    Raises:
        GraphError: the model's inputs and outputs are not understood.
    """
    signature = detect_signature(model)
    return tuple(scenarios_for(signature, geometry(model, signature))[1])


@dataclass(frozen=True)
class _Reference:
    data: CaseData
    outputs: Mapping[str, Array]


@dataclass
class _Precision:
    name: str
    upcast: bool
    references: list[_Reference] = field(default_factory=list)


class Verifier:
    """Remembers what a model answers, to compare any number of rewrites with it.

    Args:
        before: the reference model, in either form of :mod:`signature`; it is run at once and not kept.
        seed: of the scenarios' numbers.
        tolerance: the relative fp32 bound; :data:`FLOAT32_BOUND` by default.

    Raises:
        GraphError: the model's inputs and outputs are not understood.
        VerificationError: there is no scenario that the model can run.
    """

    def __init__(self, before: ir.Model, *, seed: int = 0, tolerance: float | None = None) -> None:
        signature = detect_signature(before)
        sizes = geometry(before, signature)
        scenarios, self._skipped = scenarios_for(signature, sizes)
        cases = [draw(scenario, signature, sizes, seed) for scenario in scenarios]
        self._bound = FLOAT32_BOUND if tolerance is None else tolerance
        half = half_types(before)
        self._precisions = [_Precision("fp32", upcast=bool(half))]
        if half == {ir.DataType.FLOAT16}:
            self._precisions.append(_Precision("fp16", upcast=False))
        for precision in self._precisions:
            self._run_reference(before, signature, sizes, cases, precision)
        if not self._precisions[0].references:
            reasons = "; ".join(f"{each.scenario}: {each.reason}" for each in self._skipped)
            raise VerificationError(f"the model runs none of the scenarios that verify a rewrite ({reasons}).")

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Scenarios that the reference model cannot express or run."""
        return tuple(self._skipped)

    def _run_reference(
        self, model: ir.Model, signature: Signature, sizes: Geometry, cases: list[CaseData], precision: _Precision
    ) -> None:
        executable = Executable(model, upcast=precision.upcast)
        alone = _takes_rows_alone(model)
        for data in cases:
            name = data.scenario.name if precision.name == "fp32" else f"{data.scenario.name} ({precision.name})"
            try:
                outputs = _answer(executable, data, signature, sizes, rows_alone=alone)
            except GraphError as error:
                self._skipped.append(Skipped(name, str(error)))
                continue
            if not all(np.isfinite(output).all() for output in outputs.values()):
                self._skipped.append(Skipped(name, "the model itself answers with infinities or NaN"))
                continue
            precision.references.append(_Reference(data, outputs))

    def check(self, after: ir.Model) -> Verification:
        """Compare ``after`` with the reference; a graph that cannot be run is a failed verification, not an error."""
        checks: list[Check] = []
        try:
            signature = detect_signature(after)
            sizes = geometry(after, signature)
            alone = _takes_rows_alone(after)
            for precision in self._precisions:
                executable = Executable(after, upcast=precision.upcast)
                for reference in precision.references:
                    found = _answer(executable, reference.data, signature, sizes, rows_alone=alone)
                    checks += self._compare(reference, found, precision.name)
        except GraphError as error:
            return Verification(tuple(checks), self.skipped, f"the rewritten graph fails: {error}")
        return Verification(tuple(checks), self.skipped)

    def _compare(self, reference: _Reference, found: Mapping[str, Array], precision: str) -> list[Check]:
        if list(found) != list(reference.outputs):
            raise GraphError(f"it has {len(found) // 2} caches where {len(reference.outputs) // 2} are expected.")
        checks = []
        for name, expected in reference.outputs.items():
            actual = found[name]
            if actual.shape != expected.shape:
                raise GraphError(f"{name} has shape {actual.shape} where {expected.shape} is expected.")
            if precision == "fp16":
                error, scale, bound = _root_mean_square(actual - expected), _root_mean_square(expected), FLOAT16_BOUND
            else:
                error, scale, bound = _largest(actual - expected), _largest(expected), self._bound
            scale = max(scale, float(np.finfo(np.float32).tiny))
            checks.append(Check(reference.data.scenario.name, name, precision, error, scale, bound))
        return checks


def _answer(
    executable: Executable, data: CaseData, signature: Signature, sizes: Geometry, *, rows_alone: bool
) -> Mapping[str, Array]:
    fed, names = feeds(data, signature, sizes), output_names(signature)
    if rows_alone and len(data.scenario.past) > 1 and data.scenario.padded_new > 1 and any(data.scenario.past):
        rows = [{name: array[row : row + 1] for name, array in fed.items()} for row in range(len(data.scenario.past))]
        results = zip(*[executable.run(row, names) for row in rows], strict=True)
        return readings(data, signature, [np.concatenate(parts) for parts in results])
    return readings(data, signature, executable.run(fed, names))


def _takes_rows_alone(model: ir.Model) -> bool:
    """Whether several new tokens against a part-filled cache must be run a row at a time.

    ONNX Runtime's CPU kernel of ``GroupQueryAttention`` refuses them in a batch; the rows do not depend on each other.
    """
    return any(node.op_type == "GroupQueryAttention" and node.domain == "com.microsoft" for node in model.graph)


def _largest(array: Array) -> float:
    return float(np.max(np.abs(array))) if array.size else 0.0


def _root_mean_square(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0
