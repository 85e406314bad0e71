"""Rounding a matrix column by column, each column's error made up for by the columns that are still to come.

GPTQ (Frantar et al. 2022, arXiv:2210.17323): with the second moments H = X^T X of a layer's inputs, rounding column j
of the weights W [N, K] by an error e moves the remaining columns by -e / U[j, j] * U[j, j+1:], U the upper Cholesky
factor of the damped H^-1. That is the least squares answer to "which change of the rest undoes most of e".

Scales are given and do not change, so that clipping and smoothing that were searched for stay in force; the columns are
then free to be taken from the largest second moment to the smallest, whatever group they belong to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.exporter.quantized_weights import CODE_DTYPES, WeightFormat
from qwenforge.exporter.transforms import CODE_RANGES, spread_groups

Array = npt.NDArray[Any]

_BLOCK = 128
"""Columns whose errors are passed on together."""


def round_with_compensation(
    weight: Array,
    second_moments: Array,
    scales: Array,
    *,
    weight_format: WeightFormat,
    group_size: int,
    damping: float = 0.01,
) -> npt.NDArray[np.int8]:
    """Codes of ``weight`` that keep the outputs of the inputs seen.

    Args:
        weight: [N, K], finite.
        second_moments: [K, K], the sum or mean of x x^T over inputs x; any positive factor gives the same codes.
        scales: [N, G], groups of ``group_size`` columns.
        weight_format: ``int8`` or ``int4``.
        damping: added to the diagonal, as a fraction of its mean, until the matrix can be factored.

    Returns:
        [N, K] int8 codes; what is never seen (a zero on the diagonal) is rounded to nearest.

    Raises:
        ValueError: the format has no integers, shapes do not fit, or the moments are not finite.
    """
    if weight_format not in ("int8", "int4"):
        raise ValueError(f"{weight_format} is not a signed integer format")
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    if second_moments.shape != (columns, columns) or scales.shape != (rows, groups):
        raise ValueError(f"moments {second_moments.shape} or scales {scales.shape} do not fit weights {weight.shape}")
    if not np.isfinite(second_moments).all():
        raise ValueError("the second moments are not finite")
    low, high = CODE_RANGES[ir.DataType(CODE_DTYPES[weight_format])]
    diagonal = np.diag(second_moments)
    order = np.argsort(-diagonal, kind="stable")
    remaining = weight[:, order].astype(np.float64)
    steps = spread_groups(scales, group_size, columns)
    steps = np.broadcast_to(steps, weight.shape)[:, order].astype(np.float64)
    factor = _inverse_factor(second_moments[np.ix_(order, order)].astype(np.float64), damping)
    codes = np.empty((rows, columns), np.int8)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = np.empty((rows, end - start))
        for column in range(start, end):
            step = steps[:, column]
            code = np.clip(np.rint(remaining[:, column] / step), low, high)
            codes[:, order[column]] = code
            error = (remaining[:, column] - code * step) / factor[column, column]
            remaining[:, column + 1 : end] -= np.outer(error, factor[column, column + 1 : end])
            errors[:, column - start] = error
        remaining[:, end:] -= errors @ factor[start:end, end:]
    return codes


def _inverse_factor(moments: Array, damping: float) -> Array:
    """The upper Cholesky factor of the inverse of ``moments``, damped as far as it takes.

    A channel that is never seen gets the second moment of an ordinary one: it is then correlated with nothing, and
    neither takes nor passes on an error.
    """
    diagonal = np.diag(moments)
    level = float(diagonal[diagonal > 0].mean()) if (diagonal > 0).any() else 1.0
    filled = moments + np.diag(np.where(diagonal > 0, 0.0, level))
    while True:
        try:
            damped = filled + damping * level * np.eye(len(filled))
            inverse = np.linalg.inv(damped)
            lower = np.linalg.cholesky((inverse + inverse.T) / 2)
        except np.linalg.LinAlgError:
            damping = max(2 * damping, 1e-3)
            continue
        factor: Array = lower.T
        return factor
