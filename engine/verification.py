"""Compare an exported model with transformers on the same checkpoint: logits, and the tokens they choose.

*Whole model*: 8 prompts of unequal length are prefilled in one right-padded batch, then both sides decode 64 tokens,
the reference choosing greedily and both being fed its choice, so that every step compares like with like.

*Layer by layer*, for a model whose weights do not fit in memory twice: both sides hold one layer's weights at a time.
Greedy decoding would read all weights 64 times, so the 64 tokens after each prompt are given; the choice is compared at
every position, in a prefill and in two calls against the part-filled cache (one token, then three).

A 16-bit model is computed in fp32 on both sides, from weights rounded to 16 bits, and held to the bound of fp32. That
proves the graph and the weights; in 16 bits, rounding alone moves the logits of a deep model with experts as far as
some wrong graphs do. An fp16 model is also computed in fp16, where its logits must be finite and no further off than
rounding explains. ONNX Runtime has no bf16 kernels for the CPU: how bf16 rounds is left to the device.

Likewise a model of our CPU kernels, which round activations to INT8: the same weights by ONNX Runtime's, which do not
where weights stay mapped, are held to the bound of fp32, and ours to what that rounding explains.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.calibration.budget import EIGHT_BITS_ACTIVATIONS
from qwenforge.engine.executor import StepExecutor
from qwenforge.engine.reference import Reference
from qwenforge.engine.threads import single_threaded_torch
from qwenforge.errors import VerificationError
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.leaves import read_blocks

PROMPTS = 8
NEW_TOKENS = 64


@dataclass(frozen=True)
class Tolerance:
    """How far exported logits may be from the reference's.

    Attributes:
        bound: largest accepted difference of a logit at a position.
        logit_scale: above this largest logit the bound grows in proportion, as rounding errors do.
        stray_positions: fraction of the positions that may be beyond ``bound``, as long as ``mean_kl`` holds.
        stray_tokens: fraction of the positions whose choice may differ beyond a near tie.
        mean_kl: largest accepted mean KL divergence over the positions, in nats; None for no limit of its own.
    """

    bound: float
    logit_scale: float
    stray_positions: float = 0.0
    stray_tokens: float = 0.0
    mean_kl: float | None = None


FP32 = Tolerance(2e-4, 64.0)
"""Only the order of summation differs."""
FP16 = Tolerance(1.6e-1, 16.0, stray_positions=0.1, mean_kl=1e-2)
"""One percent of the scale, some twenty roundings of 2^-11 in a row. Of transformers' own fp16 model with 24 random
layers, 5 % of the positions are beyond that, at a mean KL of 4e-4; a broken kernel is off by units."""
FP16_ROUTED = Tolerance(1.6e-1, 16.0, stray_positions=1.0, stray_tokens=0.1, mean_kl=1e-1)
"""With experts, rounding can swap two whose router logits nearly tie, and a swap moves a position's logits by units. Of
transformers' own fp16 model with 12 to 24 layers and random routers, the worst case, up to 76 % of the positions are
beyond the bound and 3.5 % choose another token, at a mean KL of 3.5e-2."""


ROUNDED = Tolerance(
    1.6e-1,
    16.0,
    stray_positions=0.1,
    stray_tokens=1 - EIGHT_BITS_ACTIVATIONS.top1,
    mean_kl=EIGHT_BITS_ACTIVATIONS.kl,
)
"""Kernels that round activations to INT8: one percent of the scale as in fp16, and what INT8 activations may lose.
Of the dense example checkpoint 1 of 661 positions is beyond the bound, at a mean KL of 3e-4."""
ROUNDED_ROUTED = Tolerance(1.6e-1, 16.0, stray_positions=1.0, stray_tokens=0.1, mean_kl=1e-1)
"""With experts a swap of two moves a position's logits by units, as in fp16. Of the example checkpoint with experts 5 %
of the positions are beyond the bound, at a mean KL of 6e-4."""


def tolerance(dtype: ir.DataType, *, routed: bool) -> Tolerance:
    """What is accepted of a model in ``dtype``, bf16 being computed in fp32; ``routed``: whether it has experts."""
    if dtype != ir.DataType.FLOAT16:
        return FP32
    return FP16_ROUTED if routed else FP16


Progress = Callable[[str, int, int], None]
Ids = npt.NDArray[np.int64]
Samples = list[tuple[list[int], npt.NDArray[np.float32]]]


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
        return self.tolerance.bound * max(1.0, self.max_logit / self.tolerance.logit_scale)

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
    graph_error: float
    """Largest difference of a logit when the model is computed in fp32: what the graph and its weights are held to."""
    references: Samples = field(repr=False, default_factory=list)
    """Prompts with the reference's logits after their last token, stored in the bundle for a device's first run."""


def fits_whole(checkpoint: Checkpoint, models: int = 2) -> bool:
    """Whether ``models`` copies in fp32, the reference's included, stay within 1.2 GB plus twice the largest tensor."""
    weights = 4 * sum(checkpoint.tensor(name).size for name in checkpoint.names)
    return models * weights <= 400e6 + 2 * checkpoint.largest_tensor_bytes(ir.DataType.FLOAT)


def verify(
    checkpoint: Checkpoint,
    model_path: Path,
    dtype: ir.DataType,
    prompts: list[list[int]],
    *,
    max_length: int,
    whole: bool | None = None,
    twin: Path | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Compare ``model_path`` with transformers on ``prompts``.

    Args:
        checkpoint: what transformers runs.
        model_path: the exported model beside its data.
        dtype: the model's.
        prompts: lists of tokens.
        max_length: the bundle's context.
        whole: keep all weights in memory; None decides by their size.
        twin: the model by kernels that round nothing, where those of ``model_path`` round activations.
        progress: told what is going on.

    Raises:
        VerificationError: logits differ by more than the bound, a token differs, or a value is not finite.
    """
    half, native = dtype != ir.DataType.FLOAT, dtype == ir.DataType.FLOAT16
    whole = fits_whole(checkpoint, 3 if native or twin is not None else 2) if whole is None else whole
    longest = max(map(len, prompts))
    new_tokens = min(NEW_TOKENS, max_length - longest - 4)

    def executor(*, upcast: bool, path: Path = model_path) -> StepExecutor:
        capacity = longest + new_tokens + 4
        return StepExecutor(path, batch=len(prompts), capacity=capacity, whole=whole, upcast=upcast)

    in_fp32 = _Side("", executor(upcast=half, path=twin or model_path), Comparison(FP32))
    sides = [in_fp32]
    if twin is not None:
        in_fp32.how = ", computed by ONNX Runtime's kernels,"
        allowed = ROUNDED_ROUTED if checkpoint.config.num_experts else ROUNDED
        sides.append(_Side(", computed by qwenforge's kernels,", executor(upcast=False), Comparison(allowed)))
    if native:
        in_fp32.how = ", computed in fp32,"
        allowed = tolerance(dtype, routed=checkpoint.config.num_experts > 0)
        sides.append(_Side(", computed in fp16,", executor(upcast=False), Comparison(allowed)))
    reference = Reference(
        checkpoint,
        resident=whole,
        rounded_to=dtype if half else None,
        rounded_rotary=in_fp32.engine.rotary_is_rounded,
    )
    run = _greedy if whole else _forced
    with single_threaded_torch() if whole else nullcontext():  # a model that fits whole is a small one
        samples = run(reference, sides, prompts, new_tokens, checkpoint.config.vocab_size, progress or _silent)
    for side in sides:
        side.require_agreement(checkpoint)
    comparison = sides[-1].comparison
    return VerificationReport(
        method="whole-model" if whole else "layer-by-layer",
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
        graph_error=in_fp32.comparison.max_abs_error,
        references=samples,
    )


@dataclass
class _Side:
    """The exported model computed one way, and how far that is from the reference."""

    how: str
    engine: StepExecutor
    comparison: Comparison

    def require_agreement(self, checkpoint: Checkpoint) -> None:
        found = self.comparison
        if found.non_finite:
            cause = _non_finite_tensor(checkpoint)
            raise VerificationError(
                f"the exported model{self.how} or transformers gives logits that are not finite ({found.worst}): "
                + (f"tensor {cause!r} of the checkpoint is not either, download it again." if cause else _OVERFLOW)
            )
        if not found.ok:
            raise VerificationError(
                f"the exported model{self.how} differs from transformers: logits by {found.max_abs_error:.2e} "
                f"(bound {found.scaled_bound:.1e}, worst {found.worst}; {found.strays} of {found.positions} positions "
                f"beyond it), {found.disagreements} tokens, mean KL {found.mean_kl:.1e}; no bundle was written. "
                "Please report this checkpoint's configuration."
            )


_OVERFLOW = "the checkpoint's weights are, so that an intermediate result overflows; try --dtype fp32."


def _non_finite_tensor(checkpoint: Checkpoint) -> str | None:
    """The first tensor with NaN or infinity in it."""
    for name in checkpoint.names:
        if not all(np.isfinite(block).all() for block in read_blocks(checkpoint.tensor(name), 1 << 24)):
            return name
    return None


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
    sides: list[_Side],
    prompts: list[list[int]],
    new_tokens: int,
    vocab: int,
    progress: Progress,
) -> Samples:
    tokens, positions, valid = _padded(prompts)
    lengths = valid.sum(1).astype(np.int64)
    every = np.tile(np.arange(tokens.shape[1]), (len(prompts), 1))
    expected = reference(tokens, positions, valid)
    for side in sides:
        ours = side.engine(tokens, positions, np.zeros(len(prompts), np.int64), every)
        side.comparison.add(expected[valid], ours[valid], "at prefill")
    last = np.arange(len(prompts)), lengths - 1
    samples = [(prompt, row) for prompt, row in zip(prompts, expected[last], strict=True)]
    choice = expected[last].argmax(-1)
    for step in range(new_tokens):
        progress("decoding", step, new_tokens)
        column = choice[:, None].astype(np.int64)
        expected = reference(column, lengths[:, None], np.ones_like(column, bool))
        for side in sides:
            ours = side.engine(column, lengths[:, None], lengths, np.zeros_like(column))
            side.comparison.add(expected[:, 0], ours[:, 0], f"at decode step {step + 1}")
        choice = expected[:, 0].argmax(-1)
        lengths = lengths + 1
    return samples


def _forced(
    reference: Reference,
    sides: list[_Side],
    prompts: list[list[int]],
    new_tokens: int,
    vocab: int,
    progress: Progress,
) -> Samples:
    generator = np.random.default_rng(0)
    rows = [[*prompt, *generator.integers(0, vocab, new_tokens).tolist()] for prompt in prompts]
    tokens, positions, valid = _padded(rows)
    lengths = valid.sum(1).astype(np.int64)
    progress("prefill, layer by layer", 0, 3)
    # Logits of 8 rows of 100 positions over a large vocabulary would outweigh a layer: one row of them at a time.
    kept = np.stack([np.linspace(0, length - 1, 12).astype(np.int64) for length in lengths])
    expected = reference(tokens, positions, valid, kept)
    vocabulary = expected.shape[-1]
    for side in sides:
        ours = side.engine(tokens, positions, np.zeros(len(rows), np.int64), kept)
        side.comparison.add(expected.reshape(-1, vocabulary), ours.reshape(-1, vocabulary), "at prefill")
    samples = [(row, logits) for row, logits in zip(rows, expected[:, -1], strict=True)]
    for call, width in enumerate((1, 3), start=1):
        progress(f"{width} token(s) against the cache", call, 3)
        tokens = generator.integers(0, vocab, (len(rows), width)).astype(np.int64)
        positions = lengths[:, None] + np.arange(width)
        index = np.tile(np.arange(width), (len(rows), 1))
        expected = reference(tokens, positions, np.ones_like(tokens, bool), index)
        for side in sides:
            ours = side.engine(tokens, positions, lengths, index)
            where = f"with {width} new tokens"
            side.comparison.add(expected.reshape(-1, vocabulary), ours.reshape(-1, vocabulary), where)
        lengths = lengths + width
    return samples


def _kl(reference: npt.NDArray[np.float32], ours: npt.NDArray[np.float32]) -> float:
    """KL(reference || ours) of two next-token distributions given as logits [V], in nats."""
    left, right = (_log_softmax(logits.astype(np.float64)) for logits in (reference, ours))
    return max(float((np.exp(left) * (left - right)).sum()), 0.0)


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max()
    normalized: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return normalized
