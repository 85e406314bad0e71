"""Reading the matrices of sites, lazy until here, and rounding them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.calibration.weight_scales import fake_quantized, group_scales
from qwenforge.errors import UserError
from qwenforge.exporter import weights
from qwenforge.exporter.weights import leaves
from qwenforge.graph_passes.quantize.plan import SitePlan

Array = npt.NDArray[Any]


def rounded(matrix: Array, choice: SitePlan) -> Array:
    """The values that ``matrix`` is quantized to, without clipping."""
    assert choice.weight is not None and choice.weight != "uint4"
    group = choice.group_size or matrix.shape[1]
    return fake_quantized(matrix, group_scales(matrix, choice.weight, group), choice.weight, group)


def read_matrix(tensor: ir.TensorProtocol, site: str) -> Array:
    """A lazy matrix as float32.

    Raises:
        UserError: it holds NaN or infinity; the tensors of the checkpoint are named.
    """
    matrix = np.array(weights.cast(tensor, ir.DataType.FLOAT).numpy())
    if not np.isfinite(matrix).all():
        names = list(dict.fromkeys(leaf.name for leaf in leaves(tensor) if leaf.name))
        raise UserError(
            f"the weight of {site} ({' or '.join(map(repr, names[:4]))}) holds NaN or infinity: download the "
            "checkpoint again"
        )
    return matrix
