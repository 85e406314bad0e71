"""Small graphs from ONNX's text form, with weights and inferred shapes, and what they answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.graph_passes.infra import FusionPass

Array = npt.NDArray[Any]


def graph_from_text(body: str, **initializers: Array | ir.TensorProtocol) -> ir.Model:
    """``body`` is ``(inputs) => (outputs) { nodes }``; ``initializers`` are values it uses by name.

    Every node is named after its first output, every value has the shape and type that ONNX infers.
    """
    from onnx_ir.passes.common import ShapeInferencePass

    header = '<ir_version: 11, opset_import: ["" : 24, "com.microsoft" : 1]>\nsmall '
    parts = []
    for name, given in initializers.items():
        dims = ", ".join(str(dim) for dim in (given.shape if isinstance(given, np.ndarray) else given.shape.numpy()))
        kind = (ir.DataType.from_numpy(given.dtype) if isinstance(given, np.ndarray) else given.dtype).name.lower()
        parts.append(f"{kind}[{dims}] {name}")
    signature, nodes = body.split("=>", 1)
    closing = signature.rstrip().rindex(")")
    declared = ", ".join(part for part in (signature[:closing].strip().removeprefix("("), *parts) if part)
    text = f"{header}({declared}) => {nodes}"
    model = ShapeInferencePass()(ir.from_onnx_text(text)).model
    inputs = {str(value.name): value for value in model.graph.inputs}
    for name, given in initializers.items():
        value = inputs[name]
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(given, name=name) if isinstance(given, np.ndarray) else given
        model.graph.register_initializer(value)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def apply_rule(rule: FusionPass, model: ir.Model) -> FusionPass:
    """Run ``rule`` on ``model`` in place, drop what became dead, and return the rule with its counts."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    rule(model)
    RemoveUnusedNodesPass()(model)
    return rule


def ops(model: ir.Model) -> list[str]:
    """The operators in order."""
    return [node.op_type for node in model.graph]


def answers(model: ir.Model, **feeds: Array) -> list[Array]:
    """The model's outputs in ONNX Runtime, its own graph optimizations off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    serialized = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def relative_error(actual: Array, expected: Array) -> float:
    """Largest difference relative to the largest expected magnitude."""
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()
    return float(difference / np.abs(expected.astype(np.float64)).max())


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: Any = np.float32) -> Array:
    """Seeded normal numbers."""
    array: Array = (np.random.default_rng([seed, *shape]).normal(0, scale, shape)).astype(dtype)
    return array
