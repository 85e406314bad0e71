"""The accuracy gate's measurement: a quantized model against the unquantized one on held-out text.

*Distributions*: the unquantized portable graph, in fp32 arithmetic, and the quantized graph as it was lowered and
written, the nodes of TensorRT and of our plugins by their reference bodies. Whole where both fit in memory; otherwise
one layer's weights at a time on either side.

*Layers*: the portable graph with quantized weights, activations and caches against the unquantized one, layer by
layer. A layer's own error is that of its output when its input is the unquantized model's; the accumulated error is
that behind all quantized layers before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qwenforge.calibration.accuracy import (
    DistributionAccuracy,
    DistributionComparison,
    HiddenComparison,
    LayerAccuracy,
    worst_layers,
)
from qwenforge.calibration.heldout import HeldOutText
from qwenforge.engine.window_runner import Array, WindowRunner, Windows, window_values
from qwenforge.errors import VerificationError

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, 0..1."""

LAYER_WINDOWS = 4
"""Windows on which layers are compared one by one: an error is an average over tokens, and 1024 of them settle it."""


@dataclass(frozen=True)
class AccuracyRun:
    """What was measured.

    Attributes:
        graphs: by the lowered graph's file, the figures over the whole held-out text.
        layers: in order.
        method: whether both models ran whole or layer by layer.
        source: what the held-out text is.
        windows, window_tokens: how many windows of how many tokens.
        overlapping: windows of the text left out because they share text with the calibration.
    """

    graphs: Mapping[str, DistributionAccuracy]
    layers: tuple[LayerAccuracy, ...]
    method: str
    source: str
    windows: int
    window_tokens: int
    overlapping: int

    @property
    def distributions(self) -> DistributionAccuracy:
        """The figures of the graph that diverges most."""
        return max(self.graphs.values(), key=lambda figures: figures.mean_kl)

    def worst(self, count: int = 3) -> list[LayerAccuracy]:
        """The layers with the largest error of their own, worst first."""
        return worst_layers(self.layers, count)


def measure(
    reference: Path,
    quantized: Sequence[Path],
    fake_quantized: ir.Model,
    text: HeldOutText,
    *,
    whole: bool,
    upcast_reference: bool,
    upcast_quantized: bool,
    session_options: Mapping[str, str],
    work_folder: Path,
    progress: Progress | None = None,
) -> AccuracyRun:
    """Compare both models on ``text``.

    Args:
        reference: the unquantized portable model beside its data.
        quantized: the quantized model as lowered for its target, beside its data; several graphs are judged each.
        fake_quantized: the portable model with its plan applied; lazy weights are streamed, a layer at a time.
        text: the held-out windows.
        whole: keep both models in memory.
        upcast_reference, upcast_quantized: compute in fp32 what the model computes in 16 bits.
        session_options: those that the quantized model will run with.
        work_folder: where pieces of ``fake_quantized`` are written while they are being read.
        progress: told what is going on.

    Raises:
        VerificationError: a logit is not finite; the message names the first layer where that is so.
    """
    tell = progress or _silent
    layers = compare_layers(
        WindowRunner.from_file(reference, whole=False, upcast=upcast_reference),
        WindowRunner.in_fp32(fake_quantized, work_folder),
        text.windows[:LAYER_WINDOWS],
        tell,
    )
    graphs: dict[str, DistributionAccuracy] = {}
    for path in quantized:
        comparison = compare_distributions(
            WindowRunner.from_file(reference, whole=whole, upcast=upcast_reference),
            WindowRunner.from_file(path, whole=whole, upcast=upcast_quantized, options=session_options),
            text.windows,
            tell,
        )
        _require_finite(comparison, layers)
        graphs[path.name] = comparison.result()
    return AccuracyRun(
        graphs=graphs,
        layers=tuple(layers),
        method="whole-model" if whole else "layer-by-layer",
        source=text.source,
        windows=len(text.windows),
        window_tokens=text.windows.shape[1],
        overlapping=text.overlapping,
    )


def _require_finite(comparison: DistributionComparison, layers: Sequence[LayerAccuracy]) -> None:
    if comparison.non_finite is not None:
        broken = next((layer.name for layer in layers if not layer.finite), None)
        place = (
            f"first in {broken}" if broken else "in no layer by itself, so in the lowered graph or behind the layers"
        )
        raise VerificationError(
            f"logits {comparison.non_finite} are not finite ({place}); no bundle was written. Leave that layer in "
            "higher precision with --override, or check the checkpoint's weights."
        )


def compare_distributions(
    reference: WindowRunner, quantized: WindowRunner, windows: Windows, progress: Progress | None = None
) -> DistributionComparison:
    """Next-token distributions of both models at every position of ``windows`` [B, S]."""
    comparison = DistributionComparison()
    tell = progress or _silent
    speed = _Speed(windows.size)
    tell("accuracy: unquantized and quantized model", 0.0)
    pairs = zip(reference.logits(windows), quantized.logits(windows), strict=True)
    for index, (expected, actual) in enumerate(pairs):
        comparison.add(expected, actual, windows[index, 1:].tolist(), f"in window {index + 1}")
        done = (index + 1) / len(windows)
        tell(f"accuracy: {speed.told((index + 1) * windows.shape[1])}", done)
    return comparison


def compare_layers(
    reference: WindowRunner, quantized: WindowRunner, windows: Windows, progress: Progress | None = None
) -> list[LayerAccuracy]:
    """Each layer's own and accumulated error over ``windows`` [B, S]; both models are in pieces.

    Raises:
        RuntimeError: the pieces of both models are not the same layers.
    """
    tell = progress or _silent
    expected_rows, actual_rows = window_values(windows), window_values(windows)
    found: list[LayerAccuracy] = []
    # What follows the layers is compared by its logits.
    pairs = list(zip(reference.pieces[:-1], quantized.pieces[:-1], strict=True))
    for index, (expected_piece, actual_piece) in enumerate(pairs):
        hidden = expected_piece.hidden
        if (expected_piece.layer, hidden) != (actual_piece.layer, actual_piece.hidden):
            raise RuntimeError(f"{expected_piece.layer} is compared with {actual_piece.layer}")
        tell(f"accuracy: {expected_piece.layer or 'embeddings'}", index / len(pairs))
        needed = reference.needed_after(index) | quantized.needed_after(index)
        own, accumulated = HiddenComparison(), HiddenComparison()
        with expected_piece.session() as expected_session, actual_piece.session() as actual_session:
            for expected_row, actual_row in zip(expected_rows, actual_rows, strict=True):
                expected = expected_piece.run(expected_session, expected_row, needed)
                chained = actual_piece.run(actual_session, actual_row, needed)
                if hidden is not None:
                    alone = actual_piece.run(actual_session, expected_row, {hidden})
                    own.add(expected[hidden], alone[hidden])
                    accumulated.add(expected[hidden], chained[hidden])
                _advance(expected_row, expected, needed)
                _advance(actual_row, chained, needed)
        if expected_piece.layer is not None:
            finite = not (own.non_finite or accumulated.non_finite)
            found.append(
                LayerAccuracy(
                    expected_piece.layer, own.sqnr_db, own.cosine, accumulated.sqnr_db, accumulated.cosine, finite
                )
            )
    return found


def _advance(row: dict[str, Array], made: dict[str, Array], needed: set[str]) -> None:
    row |= made
    for name in row.keys() - needed:
        del row[name]


class _Speed:
    """Tokens a second so far, and how long the rest takes at that speed."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._since = time.perf_counter()

    def told(self, done: int) -> str:
        rate = done / max(time.perf_counter() - self._since, 1e-9)
        return f"{rate:.0f} tokens/s, {(self._total - done) / rate:.0f} s left"


def _silent(_: str, __: float) -> None:
    return None
