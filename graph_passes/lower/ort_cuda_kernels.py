"""Which operators ONNX Runtime's CUDA execution provider has kernels for, so that no node goes to the CPU unnoticed.

A node without a kernel is run on the CPU, silently, with a copy of its inputs and outputs between the devices at every
step. The table is what ONNX Runtime 1.31.1 answers when it is asked: a session of one such node for the CUDA provider
alone, with ``session.disable_cpu_ep_fallback``, in fp16 and in bf16 (``tests/support/cuda_standin`` asks again).

On the CPU by intention, once a model and never once a layer: ``Shape``, whose result is in host memory, and the few
integer operators behind it, which make the shapes of Reshape and, for ``GroupQueryAttention``, the lengths from
``cache_position``. ONNX Runtime moves such chains there by itself, because ``total_sequence_length`` and shapes are
read by the host anyhow; the one copy to the device is of [B] integers.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import op_spec
from qwenforge.graph_passes.infra import FusionPass

_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})

KERNELS: dict[tuple[str, str], frozenset[ir.DataType]] = {
    ("", "Add"): _HALVES | _INTEGERS,
    ("", "Cast"): _HALVES | _INTEGERS | {ir.DataType.FLOAT},
    ("", "Concat"): _HALVES | _INTEGERS,
    ("", "Gather"): _HALVES | _INTEGERS,
    ("", "GatherND"): _HALVES,
    ("", "MatMul"): _HALVES,
    ("", "Mul"): _HALVES | _INTEGERS,
    ("", "RMSNormalization"): _HALVES,
    ("", "ReduceMax"): frozenset({ir.DataType.INT32}),
    ("", "Reshape"): _HALVES,
    ("", "RotaryEmbedding"): _HALVES,
    ("", "Shape"): _INTEGERS,
    ("", "Sigmoid"): _HALVES,
    ("", "Split"): _HALVES,
    ("", "Sub"): _HALVES | _INTEGERS,
    ("", "Unsqueeze"): _HALVES | _INTEGERS,
    ("com.microsoft", "FusedMatMul"): _HALVES,
    ("com.microsoft", "GroupQueryAttention"): _HALVES,
    ("com.microsoft", "MatMulNBits"): _HALVES,
    ("com.microsoft", "MoE"): _HALVES,
    ("com.microsoft", "QuickGelu"): _HALVES,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _HALVES,
    (op_spec.NAMESPACE, "QwenForgeAttention"): _HALVES,
    (op_spec.NAMESPACE, "QwenForgeMoE"): _HALVES,
}
"""Element types of the first output, by operator (domain, name); all inputs that are not indices are of that type."""

HOST_OPERATORS = frozenset({"Shape", "Add", "Cast", "Concat", "Gather", "Mul", "ReduceMax", "Sub"})
"""What may run on the CPU, on integers."""


def without_kernel(model: ir.Model) -> list[str]:
    """One clause for each node of ``model`` that the CUDA provider has no kernel for; empty when it has them all."""
    found = []
    for node in model.graph:
        types, output = KERNELS.get((node.domain, node.op_type)), node.outputs[0]
        if types is None:
            found.append(f"ONNX Runtime has no CUDA kernel for {node.op_type} that is known here (node {node.name})")
        elif output.dtype is not None and output.dtype not in types:
            kind = output.dtype.name.lower()
            found.append(f"ONNX Runtime has no CUDA kernel for {node.op_type} in {kind} (node {node.name})")
    return found


class ReportMissingKernels(FusionPass):
    """Changes nothing: says of each node without a CUDA kernel that it would run on the CPU."""

    name: ClassVar[str] = "ort_cuda_kernels"

    def run(self, model: ir.Model) -> None:
        for clause in without_kernel(model):
            self.fail(f"{clause}: it runs on the CPU")
