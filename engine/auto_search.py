"""``--auto``: the search of :mod:`qwenforge.calibration.sensitivity` with models that run.

A group is measured alone with one layer's pieces exchanged: what precedes the layer has been computed once, and what
follows is the unquantized model. A choice for the whole model runs its fake-quantized portable graph. The unquantized
logits at every position are kept on disk for as long as the search lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.calibration.accuracy import DistributionAccuracy, DistributionComparison
from qwenforge.calibration.budget import Budget
from qwenforge.calibration.sensitivity import Choice, Frontier, Level, group_of, mixed_plan, search
from qwenforge.engine.window_runner import WindowRunner, Windows, window_values
from qwenforge.exporter.quantized_weights import CODE_DTYPES
from qwenforge.graph_passes.infra import weight
from qwenforge.graph_passes.quantize.plan import QuantizationPlan, SitePlan
from qwenforge.graph_passes.quantize.sites import find_sites

Progress = Callable[[str, float], None]
_SCALE_BYTES = 2
"""Of a scale; some targets store four bytes, which changes no order among choices."""


def search_choice(
    reference: Callable[[], WindowRunner],
    quantized: Callable[[QuantizationPlan], ir.Model],
    plans: Mapping[Level, QuantizationPlan],
    levels: tuple[Level, ...],
    windows: Windows,
    budget: Budget,
    *,
    work_folder: Path,
    progress: Progress,
) -> Frontier:
    """The groups to leave in higher precision, chosen on ``windows`` [B, S].

    Args:
        reference: the unquantized portable model in pieces and fp32 arithmetic.
        quantized: a new portable model with a plan applied, its weights lazy.
        plans: that of each level but ``keep``.
        levels: as :func:`~qwenforge.calibration.sensitivity.levels_of`.
        windows: text that the result is not judged by.
        budget: what is allowed.
        work_folder: for pieces while they are being read, and for logits.
        progress: told what is being done.

    Raises:
        VerificationError: the budget does not hold whatever is kept.
    """
    base = plans["recipe"]
    changed = [name for name, site in base.sites.items() if site.weight is not None]
    groups = list(dict.fromkeys(group_of(name) for name in changed))
    sizes = _Sizes(quantized(QuantizationPlan(base.recipe, {}, {}, (), {})), plans)
    with ExitStack() as stack:
        expected = _Logits(work_folder / "unquantized_logits.bin", windows)
        stack.callback(expected.delete)
        for logits in reference().logits(windows):
            expected.append(logits)

        def measure(choice: Choice) -> DistributionAccuracy:
            runner = WindowRunner.in_fp32(quantized(mixed_plan(plans, choice)), work_folder)
            return _compared(expected, runner.logits(windows), windows)

        alone = _Alone(reference(), quantized, plans, groups, windows, expected, work_folder)
        return search(groups, levels, alone=alone, size=sizes.of, measure=measure, budget=budget, tell=progress)


class _Alone:
    """Measures groups alone, in execution order: the state before the current layer is kept, not that before others."""

    def __init__(
        self,
        reference: WindowRunner,
        quantized: Callable[[QuantizationPlan], ir.Model],
        plans: Mapping[Level, QuantizationPlan],
        groups: list[str],
        windows: Windows,
        expected: _Logits,
        folder: Path,
    ) -> None:
        self._reference = reference
        self._quantized = quantized
        self._plans = plans
        self._all_kept: Choice = dict.fromkeys(groups, "keep")
        self._windows = windows
        self._expected = expected
        self._folder = folder
        self._rows = window_values(windows)
        self._next = 0

    def __call__(self, group: str, level: Level) -> float:
        plan = mixed_plan(self._plans, {**self._all_kept, group: level})
        uncached = QuantizationPlan(plan.recipe, plan.sites, {}, plan.smoothed, plan.tensors)
        runner = WindowRunner.in_fp32(self._quantized(uncached), self._folder)
        index = _piece_of(runner, group)
        self._advance_to(index)
        pieces = [*self._reference.pieces[:index], runner.pieces[index], *self._reference.pieces[index + 1 :]]
        mixed = WindowRunner.of_pieces(pieces)
        logits = mixed.logits_from(index, [dict(row) for row in self._rows])
        return _compared(self._expected, logits, self._windows).mean_kl

    def _advance_to(self, index: int) -> None:
        if index < self._next:
            raise ValueError("groups are measured in execution order")
        while self._next < index:
            self._reference.run_piece(self._next, self._rows)
            self._next += 1


def _piece_of(runner: WindowRunner, group: str) -> int:
    for index, piece in enumerate(runner.pieces):
        if piece.layer is not None and group.startswith(f"{piece.layer}."):
            return index
    return len(runner.pieces) - 1  # the vocabulary projection


def _compared(expected: _Logits, actual: Iterator[npt.NDArray[np.float32]], windows: Windows) -> DistributionAccuracy:
    comparison = DistributionComparison()
    for index, logits in enumerate(actual):
        comparison.add(expected[index], logits, windows[index, 1:].tolist(), f"in window {index + 1}")
    return comparison.result()


class _Logits:
    """Logits [B, S, V] in a file, written window by window and mapped."""

    def __init__(self, path: Path, windows: Windows) -> None:
        self._path = path
        self._count, self._tokens = windows.shape
        self._file = path.open("wb")
        self._mapped: npt.NDArray[np.float32] | None = None

    def append(self, logits: npt.NDArray[np.float32]) -> None:
        self._file.write(np.ascontiguousarray(logits, np.float32).tobytes())

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        if self._mapped is None:
            self._file.close()
            mapped: npt.NDArray[np.float32] = np.memmap(self._path, np.float32, "r")
            self._mapped = mapped.reshape(self._count, self._tokens, -1)
        window: npt.NDArray[np.float32] = self._mapped[index]
        return window

    def delete(self) -> None:
        self._file.close()
        self._mapped = None
        self._path.unlink(missing_ok=True)


class _Sizes:
    """Bytes of the quantizable weights under a choice."""

    def __init__(self, model: ir.Model, plans: Mapping[Level, QuantizationPlan]) -> None:
        self._plans = plans
        self._tensors: dict[str, list[ir.TensorProtocol]] = {}
        sites = find_sites(model)
        for name, site in sites.linear.items():
            self._tensors[name] = [site.weight]
        for name, experts in sites.experts.items():
            found = [weight(experts.node.inputs[index]) for index in (2, 3)]
            self._tensors[name] = [tensor for tensor in found if tensor is not None]

    def of(self, choice: Choice) -> int:
        """The bytes of codes, scales and what stays as it is."""
        total = 0
        for name, site in self._plans["recipe"].sites.items():
            level = choice.get(group_of(name), "recipe")
            plan = None if level == "keep" else self._plans[level].sites.get(name, site)
            for tensor in self._tensors[name]:
                total += _stored_bytes(tensor, plan)
        return total


def _stored_bytes(tensor: ir.TensorProtocol, plan: SitePlan | None) -> int:
    if plan is None or plan.weight is None:
        return tensor.nbytes
    # Scales: one for each row where a whole row shares one, of which there are few enough not to count exactly.
    scales = tensor.size // plan.group_size if plan.group_size else 0
    return int(tensor.size * CODE_DTYPES[plan.weight].itemsize) + _SCALE_BYTES * scales
