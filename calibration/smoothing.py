"""How much range to move from the input channels of products to their matrices.

Both methods give factors s [K], one an input channel; inputs are divided by s and the matrices' columns multiplied.

*SmoothQuant* (Xiao et al. 2022, arXiv:2211.10438, equation 4): s_j = max|x_j|^a / max|w_j|^(1-a), the second maximum
over all matrices that read the input. For 8-bit activations. Which a is best differs from place to place, and the less
text there is the smaller it is, because the largest magnitudes of a few tokens are soon exceeded. Unless it is given,
it is taken from a grid over [0, 1] by the products' outputs when inputs and smoothed matrices are quantized: with
factors and input range of one half of the tokens, saturation included, on the other half, and the other way round.

*AWQ* (Lin et al. 2023, arXiv:2306.00978, equations 4 and 5): s_j = mean|x_j|^a, with the a of a grid over [0, 1) that
moves the products' outputs least when the smoothed matrices are quantized. Factors are scaled so that the geometric
mean of the largest and the least is 1, as in its authors' code. For weights alone; a = 0 is in the grid, so that by the
measure that is minimized it never does harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SMOOTHQUANT_STRENGTHS = tuple(step / 10 for step in range(11))
AWQ_STRENGTHS = tuple(step / 20 for step in range(20))

_LEAST = 1e-5
"""No factor is below this."""
_AWQ_LEAST = 1e-4


def smoothquant_factors(input_largest: Array, weight_largest: Array, strength: float) -> Array:
    """[K] float32; 1 for a channel that is zero on either side and so has no range to move.

    Args:
        input_largest: [K], the largest magnitude of each input channel.
        weight_largest: [K], the largest magnitude of each column over all matrices.
        strength: alpha, 0 to 1.
    """
    inputs, columns = input_largest.astype(np.float64), weight_largest.astype(np.float64)
    alive = (inputs > 0) & (columns > 0)
    inputs, columns = np.where(alive, inputs, 1.0), np.where(alive, columns, 1.0)
    factors = np.maximum(inputs**strength / columns ** (1 - strength), _LEAST)
    return np.where(alive, factors, 1.0).astype(np.float32)


def awq_candidates(mean_magnitudes: Array) -> list[Array]:
    """The grid's factors, each [K] float32, the first of them all 1."""
    found = []
    for strength in AWQ_STRENGTHS:
        factors = np.maximum(mean_magnitudes.astype(np.float64) ** strength, _AWQ_LEAST)
        factors /= np.sqrt(factors.max() * factors.min())
        found.append(factors.astype(np.float32))
    return found


def output_errors(
    inputs: Array,
    matrix: Array,
    candidates: Sequence[Array],
    quantized: Callable[[Array], Array],
    quantized_inputs: Sequence[Array] | None = None,
) -> Array:
    """The mean squared change of a product's outputs by quantization, for each candidate; float64.

    Args:
        inputs: [T, K], a sample of tokens.
        matrix: [N, K].
        candidates: factors, each [K].
        quantized: gives the values [N, K] that a smoothed matrix is quantized to.
        quantized_inputs: for each candidate, the values [T, K] that the inputs are quantized to, not divided by its
            factors; None where inputs are not quantized.
    """
    errors = np.empty(len(candidates))
    for index, factors in enumerate(candidates):
        change = quantized(matrix * factors) / factors - matrix
        outputs = inputs @ change.T
        if quantized_inputs is not None:
            outputs += (quantized_inputs[index] - inputs) @ (matrix + change).T
        errors[index] = np.square(outputs, dtype=np.float64).mean()
    return errors
