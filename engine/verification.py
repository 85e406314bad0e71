"""Compare an exported model with transformers on the same checkpoint: logits, and the tokens they choose.

*Whole model*: 8 prompts of unequal length are prefilled in one right-padded batch, then both sides decode 64 tokens,
the reference choosing greedily and both being fed its choice, so that every step compares like with like.

*Layer by layer*, for a model whose weights do not fit in memory twice: both sides hold one layer's weights at a time.
Greedy decoding would read all weights 64 times, so the 64 tokens after each prompt are given; the choice is compared at
every position, in a prefill and in two calls against the part-filled cache (one token, then three).

A bf16 model is computed in fp32 on both sides, from weights rounded to bf16: ONNX Runtime has no bf16 kernels for the
CPU. That proves the graph and the weights, not how a device rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.engine.executor import StepExecutor
from qwenforge.engine.reference import Reference
from qwenforge.errors import VerificationError
from qwenforge.exporter.checkpoint import Checkpoint

PROMPTS = 8
NEW_TOKENS = 64
LOGIT_SCALE = 16.0
"""Above this largest logit a bound grows in proportion, as rounding errors do."""


@dataclass(frozen=True)
class Tolerance:
    """How far exported logits may be from the reference's.

    Attributes:
        bound: largest accepted difference of a logit at a position.
        stray_positions: fraction of the positions that may be beyond ``bound``, as long as ``mean_kl`` holds.
        stray_tokens: fraction of the positions whose choice may differ beyond a near tie.
        mean_kl: largest accepted mean KL divergence over the positions, in nats; None for no limit of its own.
    """

    bound: float
    stray_positions: float = 0.0
    stray_tokens: float = 0.0
    mean_kl: float | None = None


FP32 = Tolerance(2e-4)
"""Only the order of summation differs."""
HALF = Tolerance(1.6e-1, mean_kl=1e-2)
"""fp16 and bf16: one percent of LOGIT_SCALE, some twenty roundings of 2^-11 in a row; a wrong graph is off by units."""
HALF_ROUTED = Tolerance(1.6e-1, stray_positions=0.02, stray_tokens=0.01, mean_kl=1e-2)
"""With experts, rounding can swap two whose router logits nearly tie, which transformers' own fp16 model does as often.
A swap moves one position's logits by more than rounding does, so a few positions may stray; a wrong graph moves all."""


def tolerance(dtype: ir.DataType, *, routed: bool) -> Tolerance:
    """What is accepted for a model computed in ``dtype``; ``routed`` tells whether it has experts."""
    if dtype == ir.DataType.FLOAT:
        return FP32
    return HALF_ROUTED if routed else HALF


Progress = Callable[[str, int, int], None]
Ids = npt.NDArray[np.int64]


@dataclass
class Comparison:
    """Running account of the differences between reference and exported logits."""

    tolerance: Tolerance
    max_abs_error: float = 0.0
    max_logit: float = 0.0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    errors: list[float] = field(default_factory=list)
    disagreements: int = 0
    near_ties: int = 0
    worst: str = ""
    non_finite: bool = False
    samples: list[tuple[list[int], npt.NDArray[np.float32]]] = field(default_factory=list)

    def add(self, reference: npt.NDArray[np.float32], ours: npt.NDArray[np.float32], where: str) -> None:
        """Account for logits [N, V] of both sides at the same positions."""
        for expected, actual in zip(reference, ours, strict=True):
            self._add_row(expected, actual, where)

    def _add_row(self, expected: npt.NDArray[np.float32], actual: npt.NDArray[np.float32], where: str) -> None:
        if not np.isfinite(actual).all() or not np.isfinite(expected).all():
            self.non_finite, self.worst = True, where
            return
        error = float(np.abs(expected - actual).max())
        self.errors.append(error)
        if error > self.max_abs_error:
            self.max_abs_error, self.worst = error, where
        self.max_logit = max(self.max_logit, float(np.abs(expected).max()))
        divergence = _kl(expected, actual)
        self.kl_sum += divergence
        self.kl_max = max(self.kl_max, divergence)
        if expected.argmax() != actual.argmax():
            first, second = np.sort(expected)[[-1, -2]]
            # Two candidates closer than twice the logit bound: either order is within rounding.
            if first - second <= 2 * self.scaled_bound:
                self.near_ties += 1
            else:
                self.disagreements += 1

    @property
    def positions(self) -> int:
        """How many positions were compared."""
        return len(self.errors)

    @property
    def scaled_bound(self) -> float:
        """The bound for logits as large as those seen."""
        return self.tolerance.bound * max(1.0, self.max_logit / LOGIT_SCALE)

    @property
    def mean_kl(self) -> float:
        """Mean over the positions of KL(reference || exported), in nats."""
        return self.kl_sum / max(1, self.positions)

    @property
    def strays(self) -> int:
        """Positions with a logit beyond the bound."""
        return sum(error > self.scaled_bound for error in self.errors)

    @property
    def ok(self) -> bool:
        """Whether logits and choices agree."""
        allowed = self.tolerance
        return (
            not self.non_finite
            and self.positions > 0
            and self.strays <= allowed.stray_positions * self.positions
            and self.disagreements <= allowed.stray_tokens * self.positions
            and (allowed.mean_kl is None or self.mean_kl <= allowed.mean_kl)
        )


@dataclass(frozen=True)
class VerificationReport:
    """What was compared and how far the exported model is from transformers."""

    method: str
    prompts: int
    new_tokens: int
    positions: int
    strays: int
    max_abs_error: float
    bound: float
    mean_kl: float
    max_kl: float
    token_disagreements: int
    near_ties: int
    references: list[tuple[list[int], npt.NDArray[np.float32]]] = field(repr=False, default_factory=list)
    """Prompts with the reference's logits after their last token, stored in the bundle for a device's first run."""


def fits_whole(checkpoint: Checkpoint) -> bool:
    """Whether reference and export together stay within 1.2 GB plus twice the largest tensor."""
    weights = 4 * sum(checkpoint.tensor(name).size for name in checkpoint.names)
    return 2 * weights <= 400e6 + 2 * checkpoint.largest_tensor_bytes(ir.DataType.FLOAT)


def verify(
    checkpoint: Checkpoint,
    model_path: Path,
    dtype: ir.DataType,
    prompts: list[list[int]],
    *,
    max_length: int,
    whole: bool | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Compare ``model_path`` with transformers on ``prompts``.

    Raises:
        VerificationError: logits differ by more than the bound, a token differs, or a value is not finite.
    """
    whole = fits_whole(checkpoint) if whole is None else whole
    longest = max(map(len, prompts))
    new_tokens = min(NEW_TOKENS, max_length - longest - 4)
    capacity = longest + new_tokens + 4
    comparison = Comparison(tolerance(dtype, routed=checkpoint.config.num_experts > 0))
    in_fp32 = dtype == ir.DataType.BFLOAT16
    reference = Reference(checkpoint, resident=whole, rounded_to=dtype if in_fp32 else None)
    engine = StepExecutor(model_path, batch=len(prompts), capacity=capacity, whole=whole, upcast=in_fp32)
    run = _greedy if whole else _forced
    run(reference, engine, prompts, new_tokens, checkpoint.config.vocab_size, comparison, progress or _silent)
    method = "whole-model" if whole else "layer-by-layer"
    report = VerificationReport(
        method=method,
        prompts=len(prompts),
        new_tokens=new_tokens,
        positions=comparison.positions,
        strays=comparison.strays,
        max_abs_error=comparison.max_abs_error,
        bound=comparison.scaled_bound,
        mean_kl=comparison.mean_kl,
        max_kl=comparison.kl_max,
        token_disagreements=comparison.disagreements,
        near_ties=comparison.near_ties,
        references=comparison.samples,
    )
    if comparison.non_finite:
        raise VerificationError(
            f"the exported model or transformers gives logits that are not finite ({comparison.worst})."
        )
    if not comparison.ok:
        raise VerificationError(
            f"the exported model differs from transformers: logits by {report.max_abs_error:.2e} "
            f"(bound {report.bound:.1e}, worst {comparison.worst}; {report.strays} of {report.positions} positions "
            f"beyond it), {report.token_disagreements} tokens, mean KL {report.mean_kl:.1e}; no bundle was written. "
            "Please report this checkpoint's configuration."
        )
    return report


def _silent(_: str, __: int, ___: int) -> None:
    return None


def _padded(rows: list[list[int]]) -> tuple[Ids, Ids, npt.NDArray[np.bool_]]:
    """Right-padded tokens, their positions and which are valid, each [B, S]."""
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int64)
    valid = np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], valid[index, : len(row)] = row, True
    positions = np.tile(np.arange(width), (len(rows), 1))
    return tokens, positions, valid


def _greedy(
    reference: Reference,
    engine: StepExecutor,
    prompts: list[list[int]],
    new_tokens: int,
    vocab: int,
    comparison: Comparison,
    progress: Progress,
) -> None:
    tokens, positions, valid = _padded(prompts)
    lengths = valid.sum(1).astype(np.int64)
    every = np.tile(np.arange(tokens.shape[1]), (len(prompts), 1))
    expected = reference(tokens, positions, valid)
    ours = engine(tokens, positions, np.zeros(len(prompts), np.int64), every)
    comparison.add(expected[valid], ours[valid], "at prefill")
    last = np.arange(len(prompts)), lengths - 1
    comparison.samples = [(prompt, row) for prompt, row in zip(prompts, expected[last], strict=True)]
    choice = expected[last].argmax(-1)
    for step in range(new_tokens):
        progress("decoding", step, new_tokens)
        column = choice[:, None].astype(np.int64)
        expected = reference(column, lengths[:, None], np.ones_like(column, bool))
        ours = engine(column, lengths[:, None], lengths, np.zeros_like(column))
        comparison.add(expected[:, 0], ours[:, 0], f"at decode step {step + 1}")
        choice = expected[:, 0].argmax(-1)
        lengths = lengths + 1


def _forced(
    reference: Reference,
    engine: StepExecutor,
    prompts: list[list[int]],
    new_tokens: int,
    vocab: int,
    comparison: Comparison,
    progress: Progress,
) -> None:
    generator = np.random.default_rng(0)
    rows = [[*prompt, *generator.integers(0, vocab, new_tokens).tolist()] for prompt in prompts]
    tokens, positions, valid = _padded(rows)
    lengths = valid.sum(1).astype(np.int64)
    progress("prefill, layer by layer", 0, 3)
    # Logits of 8 rows of 100 positions over a large vocabulary would outweigh a layer: one row of them at a time.
    kept = np.stack([np.linspace(0, length - 1, 12).astype(np.int64) for length in lengths])
    expected = reference(tokens, positions, valid, kept)
    ours = engine(tokens, positions, np.zeros(len(rows), np.int64), kept)
    vocabulary = expected.shape[-1]
    comparison.add(expected.reshape(-1, vocabulary), ours.reshape(-1, vocabulary), "at prefill")
    comparison.samples = [(row, logits) for row, logits in zip(rows, expected[:, -1], strict=True)]
    for call, width in enumerate((1, 3), start=1):
        progress(f"{width} token(s) against the cache", call, 3)
        tokens = generator.integers(0, vocab, (len(rows), width)).astype(np.int64)
        positions = lengths[:, None] + np.arange(width)
        index = np.tile(np.arange(width), (len(rows), 1))
        expected = reference(tokens, positions, np.ones_like(tokens, bool), index)
        ours = engine(tokens, positions, lengths, index)
        comparison.add(expected.reshape(-1, vocabulary), ours.reshape(-1, vocabulary), f"with {width} new tokens")
        lengths = lengths + width


def _kl(reference: npt.NDArray[np.float32], ours: npt.NDArray[np.float32]) -> float:
    """KL(reference || ours) of two next-token distributions given as logits [V], in nats."""
    left, right = (_log_softmax(logits.astype(np.float64)) for logits in (reference, ours))
    return max(float((np.exp(left) * (left - right)).sum()), 0.0)


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max()
    normalized: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return normalized
