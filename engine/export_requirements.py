"""What an export has to have on its way, each refused where it is missing."""

from __future__ import annotations

import onnx_ir as ir

from qwenforge import names
from qwenforge.errors import UnsupportedError, UserError
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.trace import TracedModel
from qwenforge.graph_passes.lower.ort_cuda_kernels import without_kernel


def require_weight_inputs(source: Checkpoint, *, quantized: bool) -> None:
    """Refuse weights as inputs where next to none could be one.

    Raises:
        UnsupportedError: the model is ``quantized`` and has no experts.
    """
    if quantized and not source.config.num_experts:
        raise UnsupportedError(
            "--weights-as inputs is for weights in 16 bits and for packed experts: TensorRT wants the codes of "
            "quantized products when it builds, and this model has nothing else to quantize; leave --weights-as out."
        )


def require_cuda_kernels(model: ir.Model) -> None:
    """Refuse a graph of which ONNX Runtime would run a node on the CPU, with its data copied back and forth.

    Raises:
        UnsupportedError: a node has no CUDA kernel; the message names it.
    """
    if found := without_kernel(model):
        raise UnsupportedError(
            f"{found[0]}, so that it would run on the CPU and its data be copied at every step; export for another "
            "target, such as ort-cpu or tensorrt."
        )


def context_length(source: Checkpoint, asked: int | None, default: int) -> int:
    """``--max-length`` as ``asked``, else the smaller of ``default`` and the model's.

    Raises:
        UserError: it is less than 16 or more than the model's.
    """
    limit = source.config.max_position_embeddings
    if asked is None:
        return min(limit, default)
    if asked < 16:
        raise UserError(f"--max-length is {asked}; a context needs at least 16 tokens.")
    if asked > limit:
        raise UserError(f"--max-length {asked} is beyond the model's {limit} positions (max_position_embeddings).")
    return asked


def require_fused(model: ir.Model, traced: TracedModel, source: Checkpoint) -> None:
    """Our own trace must reach the portable form; anything else is a bug, not the user's fault."""
    ops = [(node.domain, node.op_type) for node in model.graph]
    kinds = [source.config.layer_kinds[layer] for layer in traced.representative]
    expected = {
        (names.DOMAIN, "GroupedQueryAttention"): len(kinds),
        (names.DOMAIN, "MixtureOfExperts"): sum(kind.sparse for kind in kinds),
    }
    for op, count in expected.items():
        if ops.count(op) != count:
            raise RuntimeError(f"the traced model has {ops.count(op)} fused {op[1]} nodes where {count} are expected")
