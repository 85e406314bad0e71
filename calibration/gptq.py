"""Rounding a matrix column by column, each column's error made up for by the columns that are still to come.

GPTQ (Frantar et al. 2022, arXiv:2210.17323): with the second moments H = X^T X of a layer's inputs, the errors e of a
row of weights cost e H e^T. Of the columns that are still to come, each is moved by what undoes most of the errors made
so far, before it is rounded itself. GPTQ finds that move with the inverse of H. Taken from the last column to the first
it needs only the Cholesky factor H = L L^T (Chen et al. 2025, arXiv:2507.18553: GPTQ is Babai's nearest plane
algorithm): e H e^T = |e L|^2, whose j-th term is e[j] L[j, j] + sum over i > j of e[i] L[i, j], and e[j] is chosen to
make it as near to 0 as codes allow.

Scales are given and do not change, so that clipping and smoothing that were searched for stay in force; the columns are
then free to be taken from the largest second moment to the smallest, whatever group they belong to.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.exporter.quantized_weights import CODE_DTYPES, WeightFormat
from qwenforge.exporter.transforms import CODE_RANGES

Array = npt.NDArray[Any]

_BLOCK = 32
"""Columns whose errors are passed on together: few enough for a processor's cache to hold their terms."""
_DAMPING = 0.01
WIDEST = 8192
"""Input channels whose moments are taken together: about 28 bytes of memory for each pair of them."""


def channel_blocks(channels: int) -> list[slice]:
    """Input channels in blocks of nearly equal width, none above :data:`WIDEST`: errors stay within one."""
    count = -(-channels // WIDEST)
    ends = np.linspace(0, channels, count + 1).astype(int)
    return [slice(int(start), int(end)) for start, end in itertools.pairwise(ends)]


class CompensatedRounding:
    """Rounds matrices that read the same inputs.

    Args:
        second_moments: [K, K], the sum or mean of x x^T over inputs x; any positive factor gives the same codes. A
            channel that is never seen (a zero on the diagonal) is rounded to nearest.
        damping: added to the diagonal, as a fraction of its mean, until the matrix can be factored.

    Raises:
        ValueError: the moments are not finite.
    """

    def __init__(self, second_moments: Array, damping: float = _DAMPING) -> None:
        if not np.isfinite(second_moments).all():
            raise ValueError("the second moments are not finite")
        # From the smallest to the largest: the last column is rounded first.
        self._order = np.argsort(-np.diag(second_moments), kind="stable")[::-1]
        self._factor = _factor(second_moments[np.ix_(self._order, self._order)], damping)

    def round(self, weight: Array, steps: Array, weight_format: WeightFormat) -> npt.NDArray[np.int8]:
        """Codes [N, K] int8 of ``weight`` [N, K] that keep the outputs of the inputs seen.

        Args:
            weight: finite.
            steps: [N, K] or [N, 1], the scale of each weight.
            weight_format: ``int8`` or ``int4``.

        Raises:
            ValueError: the format has no integers, or shapes do not fit.
        """
        if weight_format not in ("int8", "int4"):
            raise ValueError(f"{weight_format} is not a signed integer format")
        columns = len(self._order)
        if weight.shape[1] != columns or steps.shape not in (weight.shape, (len(weight), 1)):
            raise ValueError(f"moments of {columns} channels or steps {steps.shape} do not fit weights {weight.shape}")
        low, high = CODE_RANGES[ir.DataType(CODE_DTYPES[weight_format])]
        factor, order = self._factor, self._order
        wanted = weight.T[order].astype(np.float64)  # [K, N]: a column of the matrix is a row here
        steps_by_column = np.broadcast_to(steps, weight.shape).T[order]
        codes = np.empty((columns, len(weight)), np.int8)
        errors = np.empty_like(wanted)
        for end in range(columns, 0, -_BLOCK):
            start = max(0, end - _BLOCK)
            made = factor[end:, start:end].T @ errors[end:]  # [block, N]: what columns from the end on add to its terms
            for column in range(end - 1, start - 1, -1):
                place, step = column - start, steps_by_column[column].astype(np.float64)
                target = wanted[column] + made[place] / factor[column, column]
                code = np.clip(np.rint(target / step), low, high)
                errors[column] = wanted[column] - code * step
                codes[order[column]] = code
                made[:place] += np.outer(factor[column, start:column], errors[column])
        return np.ascontiguousarray(codes.T)


def _factor(moments: Array, damping: float) -> Array:
    """The lower Cholesky factor of ``moments``, damped as far as it takes; float64.

    A channel that is never seen gets the second moment of an ordinary one: it is then correlated with nothing, and
    neither takes nor passes on an error.
    """
    diagonal = np.diag(moments).astype(np.float64)
    level = float(diagonal[diagonal > 0].mean()) if (diagonal > 0).any() else 1.0
    filled = np.where(diagonal > 0, diagonal, level)
    damped = moments.astype(np.float64)
    while True:
        np.fill_diagonal(damped, filled + damping * level)
        try:
            factor: Array = np.linalg.cholesky(damped)
        except np.linalg.LinAlgError:
            damping = max(2 * damping, 1e-3)
            continue
        return factor
