"""Products by quantized matrices -> ONNX Runtime's kernels for them on a CPU, in one of two forms.

======== ============================================ ======================================================
form     kernel                                       activations
======== ============================================ ======================================================
blocks   ``com.microsoft::MatMulNBits``, 4 or 8 bits  int8 within the kernel (accuracy level 4), a scale for each
                                                      block of each token
integers ``com.microsoft::MatMulIntegerToFloat``      uint8 around 128 in the graph: by the static scale of a
                                                      calibration, else by a scale for each token
======== ============================================ ======================================================

Blocks read the least memory for a token and win at decode; integers multiply twice as fast and win at prefill, for
weights of 8 bits with a scale for each row. ``static`` chooses by the weights and the calibration alone: integers where
there is a static scale, which then compute what the fake-quantized graph computes, to the last step.

Activations are unsigned because the kernel for int8 by int8 is 40 times slower; 128 more in each of them changes no
value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qwenforge import names
from qwenforge.errors import UnsupportedError
from qwenforge.exporter import weights
from qwenforge.exporter.block_codes import block_size, rounded
from qwenforge.exporter.quantized_weights import QuantizedWeight, as_quantized
from qwenforge.exporter.transforms import Dequantize, Quantize
from qwenforge.exporter.weights import DerivedTensor, dims
from qwenforge.graph_passes.infra import FusionPass, add_initializer, constant, is_op, replace_node, scalar, tag, weight
from qwenforge.graph_passes.lower.ort_block_product import MICROSOFT, multiply_blocks

INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy level: twice the speed of fp32 activations at decode, measured in ONNX Runtime 1.32."""

Form = Literal["static", "blocks", "integers"]


@dataclass(frozen=True)
class Activations:
    """What a product reads: ``value`` in floating point, and the static int8 scale of a calibration, if any."""

    value: ir.Value
    scale: float | None


@dataclass(frozen=True)
class TokenCodes:
    """uint8 ``codes`` of activations and the ``scale`` of each token [.., 1]; None where it is the static one."""

    codes: ir.Value
    static: ir.Value
    scale: ir.Value | None


class LowerQuantizedLinear(FusionPass):
    """Replace every product by a quantized matrix.

    Raises:
        UnsupportedError: a matrix is of a format that no kernel of ONNX Runtime on a CPU takes.
    """

    name: ClassVar[str] = "ort_quantized_linear"

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self._codes: dict[tuple[ir.Value, float | None], TokenCodes] = {}

    def run(self, model: ir.Model) -> None:
        self._codes = {}
        for node in list(model.graph):
            found = quantized_matrix(node)
            if found is None:
                continue
            if found.format == "fp8":
                raise UnsupportedError(
                    f"{node.name}: ONNX Runtime has no FP8 product on a CPU; quantize to int8 or int4 for ort-cpu."
                )
            activations = _activations(node)
            rows = self._rows(model, node, found, activations)
            if rows is not None:
                self._multiply_integers(model, node, rows, activations)
                self.matches += 1
            elif (size := block_size(found)) is not None:
                multiply_blocks(
                    model,
                    node,
                    found,
                    x=activations.value,
                    block_size=size,
                    accuracy_level=INT8_ACTIVATIONS,
                    rule=self.name,
                )
                self.matches += 1
            else:
                self.fail(f"groups of {found.group_size} columns are no multiple of 16", node)

    def _rows(
        self, model: ir.Model, node: ir.Node, found: QuantizedWeight, activations: Activations
    ) -> QuantizedWeight | None:
        """The matrix as int8 with a scale for each row where the product is to be one of integers."""
        if activations.value.dtype != ir.DataType.FLOAT or self.form == "blocks":
            return None
        by_rows = found.format == "int8" and found.zero_points is None and found.group_size >= dims(found.codes)[1]
        if self.form == "static":
            return found if by_rows and activations.scale is not None else None
        if is_vocabulary(model, node):
            return None  # of one token, as at decode, whose bytes it then shares
        return found if by_rows else rounded_by_rows(node)

    def _multiply_integers(
        self, model: ir.Model, node: ir.Node, rows: QuantizedWeight, activations: Activations
    ) -> None:
        key = (activations.value, activations.scale)
        if key not in self._codes:
            self._codes[key] = self._quantize(model, node, activations, dims(rows.codes)[1])
        given = self._codes[key]
        scope = str(node.inputs[1].name) if node.inputs[1] is not None else str(node.name)
        codes = add_initializer(model, f"{scope}.rows", weights.transpose(rows.codes, (1, 0)))
        scales = weights.reshape(rows.scales, (dims(rows.scales)[0],))
        inputs = [
            given.codes,
            codes,
            given.static,
            add_initializer(model, f"{scope}.row_scales", scales),
            constant(model, "activations.middle", np.array(128, np.uint8)),
        ]
        product = ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=node.name)
        nodes = [product]
        if given.scale is not None:
            product.outputs[0].name = f"{node.name}.integers"
            nodes.append(ir.node("Mul", [product.outputs[0], given.scale], name=f"{node.name}.scaled"))
        for each in nodes:
            each.outputs[0].shape, each.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        replace_node(model, node, [tag(each, self.name) for each in nodes], nodes[-1].outputs)
        model.graph.opset_imports[MICROSOFT] = 1

    def _quantize(self, model: ir.Model, node: ir.Node, activations: Activations, columns: int) -> TokenCodes:
        """uint8 codes of the activations [.., columns], in front of ``node``, their first reader."""
        x, name = activations.value, f"{activations.value.name}"
        middle = constant(model, "activations.middle", np.array(128, np.uint8))
        nodes: list[ir.Node] = []

        def add(op_type: str, inputs: list[ir.Value], what: str, dtype: str = "FLOAT", **attributes: int) -> ir.Value:
            made = tag(ir.node(op_type, inputs, attributes, name=f"{name}.{what}"), self.name)
            nodes.append(made)
            value = made.outputs[0]
            value.name, value.type = f"{name}.{what}", ir.TensorType(ir.DataType[dtype])
            return value

        if activations.scale is not None:
            static = add_initializer(model, f"{name}.scale", ir.tensor(np.float32(activations.scale)))
            scale, codes = None, add("QuantizeLinear", [x, static, middle], "codes", "UINT8")
        else:
            static = constant(model, "activations.one", np.array(1, np.float32))
            axis = constant(model, "activations.last_axis", np.array([-1]))
            step = constant(model, "activations.step", np.array(1 / 127, np.float32))
            minus_step = constant(model, "activations.minus_step", np.array(-1 / 127, np.float32))
            least = constant(model, "activations.least", np.array(1e-30, np.float32))
            matrix = constant(model, f"activations.rows_of_{columns}", np.array([-1, columns]))
            # Two reductions only read the activations; the largest of their Abs would write them once more.
            above = add("Mul", [add("ReduceMax", [x, axis], "largest", keepdims=1), step], "above")
            below = add("Mul", [add("ReduceMin", [x, axis], "smallest", keepdims=1), minus_step], "below")
            # A token of zeros only has the scale 0, by which nothing can be divided.
            scale = add("Max", [above, below, least], "token_scale")
            # A scale for each row is for QuantizeLinear to divide by: a Div in front of it would write once more.
            scales = add("Reshape", [scale, axis], "token_scales")
            points = add("Expand", [middle, add("Shape", [scales], "tokens", "INT64")], "zero_points", "UINT8")
            rows = add("Reshape", [x, matrix], "rows")
            row_codes = add("QuantizeLinear", [rows, scales, points], "row_codes", "UINT8", axis=0)
            codes = add("Reshape", [row_codes, add("Shape", [x], "shape", "INT64")], "codes", "UINT8")
        codes.shape = x.shape
        model.graph.insert_before(node, nodes)
        return TokenCodes(codes, static, scale)


def quantized_matrix(node: ir.Node) -> QuantizedWeight | None:
    """The matrix [N, K] that ``node`` multiplies by, where it is a quantized one."""
    tensor = weight(node.inputs[1]) if node.op_type == "MatMul" and not node.domain else None
    if tensor is None or len(tensor.shape) != 2:
        return None
    return as_quantized(weights.transpose(tensor, (1, 0)))


def is_vocabulary(model: ir.Model, node: ir.Node) -> bool:
    """Whether ``node`` gives the logits."""
    value: ir.Value | None = node.outputs[0]
    while value is not None and not value.is_graph_output():
        users = [user for user, _ in value.uses()]
        value = users[0].outputs[0] if len(users) == 1 and users[0].op_type == "Cast" else None
    return value is not None and value.name == names.LOGITS


def rounded_by_rows(node: ir.Node) -> QuantizedWeight:
    """The matrix of ``node`` as it was before it was quantized, where the plan has it, in int8 with a scale a row."""
    tensor = weight(node.inputs[1])
    assert tensor is not None
    matrix = weights.transpose(unquantized(tensor), (1, 0))
    return rounded(matrix, "int8", dims(matrix)[1])


def unquantized(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The plan without the quantizations in it; codes that came from a checkpoint stay what they stand for."""
    if not isinstance(tensor, DerivedTensor):
        return tensor
    codes = tensor.sources[0]
    if isinstance(tensor.transform, Dequantize):
        made_here = isinstance(codes, DerivedTensor) and isinstance(codes.transform, Quantize)
        return codes.sources[0] if isinstance(codes, DerivedTensor) and made_here else tensor
    return DerivedTensor(tensor.transform, [unquantized(source) for source in tensor.sources])


def _activations(node: ir.Node) -> Activations:
    """What ``node`` reads, in front of a QuantizeLinear and a DequantizeLinear of one static int8 scale."""
    x = node.inputs[0]
    assert x is not None
    restored = is_op(x, "DequantizeLinear")
    rounded = is_op(restored.inputs[0], "QuantizeLinear") if restored is not None else None
    if restored is None or rounded is None or rounded.inputs[0] is None:
        return Activations(x, None)
    scale = scalar(rounded.inputs[1])
    if rounded.outputs[0].dtype != ir.DataType.INT8 or scale is None or scale != scalar(restored.inputs[1]):
        return Activations(x, None)
    points = [each.inputs[2] for each in (rounded, restored) if len(each.inputs) > 2 and each.inputs[2] is not None]
    if any(scalar(point) != 0 for point in points):
        return Activations(x, None)
    return Activations(rounded.inputs[0], scale)
