"""Text on which a quantized model is judged: never the text that it was calibrated on.

The package carries a sample, ``samples/heldout.txt``: docstrings and language reference of Python 3.11, under the PSF
licence beside it. Tokens are cut into windows that each start from an empty cache, as in the usual measurement of
perplexity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwenforge.calibration.data import load_calibration_data
from qwenforge.errors import UserError

Tokens = npt.NDArray[np.int64]

BUILT_IN = Path(__file__).parent / "samples" / "heldout.txt"
WINDOW = 256
"""Tokens of a window."""
WINDOWS = 16
"""Windows at most: 4096 distributions, where an agreement of 95 % has a standard error of a third of a percent."""
FEWEST_WINDOWS = 2
_SPARE = 3
SHARED_RUN = 32
"""Tokens in a row that make two texts the same: a licence's heading is shorter, a copied paragraph longer."""
LARGEST_OVERLAP = 0.25
"""Fraction of the windows that may be dropped for calibration text in them; beyond it the text is refused."""


@dataclass(frozen=True)
class HeldOutText:
    """Windows of held-out text.

    Attributes:
        windows: tokens [B, S].
        source: what the text is, for reports.
        overlapping: windows that were left out because they share a run of tokens with the calibration text.
    """

    windows: Tokens
    source: str
    overlapping: int = 0

    def halves(self) -> tuple[HeldOutText, HeldOutText]:
        """Every second window, and the others: to choose by one and to judge by the other.

        Raises:
            UserError: there is one window only.
        """
        if len(self.windows) < 2:
            raise UserError(
                f"{self.source} has one window of {self.windows.shape[1]} tokens, and --auto needs "
                "two: one to choose by and one to judge by; give more text with --heldout-data."
            )
        return HeldOutText(self.windows[::2], self.source), HeldOutText(self.windows[1::2], self.source)


def load_heldout(
    path: Path | None,
    tokenizer_files: Mapping[str, Path],
    *,
    vocab_size: int,
    max_length: int,
    calibration: Tokens | None = None,
    windows: int = WINDOWS,
) -> HeldOutText:
    """Windows of the text in ``path``, or of the built-in sample, chosen by a fixed seed.

    Args:
        path: what :func:`~qwenforge.calibration.data.load_calibration_data` reads; None for the sample.
        tokenizer_files: the model's, by name.
        vocab_size: of the model.
        max_length: the bundle's context, which a window must fit.
        calibration: the rows [R, L] that the model was calibrated on.
        windows: how many to take at most.

    Raises:
        UserError: the text cannot be read, is too short, does not fit the vocabulary, or is calibration text.
    """
    source = "the built-in held-out sample" if path is None else f"--heldout-data {path}"
    size = min(WINDOW, max_length)
    try:
        # More than wanted, because what overlaps is left out.
        data = load_calibration_data(
            path or BUILT_IN, tokenizer_files, vocab_size=vocab_size, rows=_SPARE * windows, row_length=size
        )
    except UserError as error:
        raise UserError(f"{source} is no text to judge the model by: {error}") from error
    found = data.tokens
    if len(found) < FEWEST_WINDOWS:
        raise UserError(
            f"{source} has {found.size} tokens, too few to judge a model by; give at least {FEWEST_WINDOWS * size}."
        )
    shares = overlapping_windows(found, calibration if calibration is not None else [])
    if shares.mean() > LARGEST_OVERLAP or len(found) - shares.sum() < FEWEST_WINDOWS:
        raise UserError(
            f"{int(shares.sum())} of {len(found)} windows of {source} hold text that the model was calibrated on, "
            "which would hide its errors; give other text with --heldout-data."
        )
    kept = found[~shares]
    chosen = np.unique(np.linspace(0, len(kept) - 1, min(windows, len(kept))).round().astype(np.int64))
    return HeldOutText(kept[chosen], source, int(shares.sum()))


def overlapping_windows(
    windows: Tokens, calibration: Iterable[npt.NDArray[np.integer]], run: int = SHARED_RUN
) -> npt.NDArray[np.bool_]:
    """Which of ``windows`` [B, S] share ``run`` tokens in a row with a calibration row; all of a shorter window."""
    run = min(run, windows.shape[1])
    seen = [_run_hashes(np.asarray(row, np.int64), run) for row in calibration if len(row) >= run]
    if not seen:
        return np.zeros(len(windows), bool)
    known = np.unique(np.concatenate(seen))
    return np.array([bool(np.isin(_run_hashes(window, run), known).any()) for window in windows], bool)


_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def _run_hashes(tokens: Tokens, run: int) -> npt.NDArray[np.uint64]:
    """A hash of each ``run`` tokens in a row: a polynomial modulo 2^64, 1e-9 likely to collide among 1e5 and 1e5."""
    total = np.zeros(len(tokens) - run + 1, np.uint64)
    values = tokens.astype(np.uint64) + np.uint64(1)
    for offset in range(run):  # unsigned numbers wrap around
        total = total * _MULTIPLIER + values[offset : offset + len(total)]
    return total
