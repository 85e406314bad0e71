"""``qwenforge::MixtureOfExperts`` and the shared expert added to it for TensorRT: our plugin, or TensorRT's layer.

The plugin takes the shared expert as more experts of the routed ones' width I: its intermediate channels are cut into
ceil(Is / I) slices, the last filled up with zeros, each chosen for every token with weight sigmoid(gate). Slices of a
SwiGLU along its channels add up to the whole, because every channel is computed on its own until the last product sums
over them.

TensorRT's layer (SM 100, 103, 110) takes the chosen experts and their weights; the router and the shared expert stay
ordinary operators beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qwenforge import names, op_spec
from qwenforge.exporter import weights
from qwenforge.graph_passes.functions import MIXTURE_OF_EXPERTS
from qwenforge.graph_passes.infra import (
    FusionPass,
    add_initializer,
    constant,
    int_attribute,
    is_op,
    other_operand,
    replace_node,
    single_consumer,
    static_dim,
    tag,
)
from qwenforge.graph_passes.lower.expert_packing import pack_down, pack_gate_up, shared_slices
from qwenforge.graph_passes.lower.tensorrt_attention import TENSORRT_DOMAIN, plugin_attributes
from qwenforge.tensorrt_choice import LAYOUT_VERSION

TRT_MOE = "TRT_MoE"
_SILU = 1
"""``activation_type`` of TRT_MoE."""


@dataclass(frozen=True)
class SharedExpert:
    """The shared expert of a layer and where its result is added to the routed experts'.

    Attributes:
        gate_up: the merged product's weight, [C, 2 Is].
        down: [Is, C].
        gate_logits: [T, 1], before the sigmoid.
        addition: the node that adds it to the routed experts.
    """

    gate_up: ir.TensorProtocol
    down: ir.TensorProtocol
    gate_logits: ir.Value
    addition: ir.Node


class PluginExperts(FusionPass):
    """Replace every expert function, with its shared expert if there is one, by the plugin."""

    name: ClassVar[str] = "tensorrt_plugin_experts"

    def run(self, model: ir.Model) -> None:
        spec = op_spec.load("moe")
        for node in _calls(model):
            x, logits, gate_up, down = node.inputs
            first, second = (value.const_value if value is not None else None for value in (gate_up, down))
            if x is None or logits is None or first is None or second is None:
                self.fail("the expert weights are not initializers", node)
                continue
            if x.dtype != logits.dtype:
                self.fail("the router's logits are of another dtype than the tokens", node)
                continue
            experts, width, hidden = weights.dims(first)[0], weights.dims(first)[1] // 2, weights.dims(first)[2]
            shared = find_shared_expert(node)
            slices = 0 if shared is None else -(-weights.dims(shared.down)[0] // width)
            attributes: dict[str, int | float] = {
                "hidden_size": hidden,
                "intermediate_size": width,
                "num_experts": experts,
                "first_local_expert": 0,
                "num_local_experts": experts,
                "num_shared_experts": slices,
                "top_k": node.attributes["top_k"].as_int(),
                "normalize_topk": node.attributes["normalize_topk"].as_int(),
                "weight_type": 0,
                "group_size": 65536,
                "layout_version": LAYOUT_VERSION,
            }
            fields = self.node_attributes(spec, attributes, node)
            more = shared_slices(shared.gate_up, shared.down, width) if shared is not None else None
            prefix = gate_up.name if gate_up is not None else node.name
            packed_first = add_initializer(model, f"{prefix}.packed", pack_gate_up(first, more))
            packed_second = add_initializer(
                model, f"{down.name if down is not None else node.name}.packed", pack_down(second, more)
            )
            inputs: list[ir.Value | None] = [x, logits, packed_first, packed_second]
            if shared is not None:
                inputs.append(shared.gate_logits)
            plugin = ir.node(spec.name, inputs, fields, domain=op_spec.NAMESPACE, name=node.name)
            tag(plugin, self.name)
            if shared is None:
                replace_node(model, node, [plugin], plugin.outputs)
            else:
                # The sum's place: by then the gate of the shared expert is computed too.
                replace_node(model, shared.addition, [plugin], plugin.outputs)
            model.graph.opset_imports[op_spec.NAMESPACE] = 1
            self.matches += 1

    def node_attributes(
        self, spec: op_spec.OpSpec, fields: dict[str, int | float], node: ir.Node
    ) -> dict[str, int | float | str]:
        """What the node is given: ``fields``, and here what TensorRT's parser finds the plugin by."""
        return plugin_attributes(spec, fields, node)


class NativeExperts(FusionPass):
    """Replace every expert function by a router of plain operators and TensorRT's own layer."""

    name: ClassVar[str] = "tensorrt_native_experts"

    def run(self, model: ir.Model) -> None:
        for node in _calls(model):
            x, logits, gate_up, down = node.inputs
            first, second = (value.const_value if value is not None else None for value in (gate_up, down))
            if x is None or x.dtype is None or logits is None or first is None or second is None:
                self.fail("the expert weights are not initializers", node)
                continue
            self._rewrite(model, node, x, logits, first, second)
            self.matches += 1

    def _rewrite(
        self,
        model: ir.Model,
        node: ir.Node,
        x: ir.Value,
        logits: ir.Value,
        gate_up: ir.TensorProtocol,
        down: ir.TensorProtocol,
    ) -> None:
        width = weights.dims(gate_up)[1] // 2
        top_k = node.attributes["top_k"].as_int()
        assert x.dtype is not None
        steps: list[ir.Node] = []

        def add(
            op: str, inputs: list[ir.Value | None], role: str, dtype: ir.DataType, outputs: int = 1, **attributes: int
        ) -> list[ir.Value]:
            domain = TENSORRT_DOMAIN if op == TRT_MOE else ""
            step = ir.node(op, inputs, attributes, num_outputs=outputs, domain=domain, name=f"{node.name}.{role}")
            for index, output in enumerate(step.outputs):
                output.name, output.type = f"{step.name}.{index}", ir.TensorType(dtype)
            steps.append(tag(step, self.name))
            return list(step.outputs)

        wide, axis = ir.DataType.FLOAT, constant(model, "experts.row_axis", [0])
        (widened,) = add("Cast", [logits], "widened", wide, to=wide.value)
        (probabilities,) = add("Softmax", [widened], "softmax", wide, axis=-1)
        count = constant(model, f"experts.top_k.{top_k}", [top_k])
        top, chosen = add("TopK", [probabilities, count], "top_k", wide, 2, axis=-1, largest=1, sorted=1)
        chosen.type = ir.TensorType(ir.DataType.INT64)
        if node.attributes["normalize_topk"].as_int():
            last = constant(model, "experts.last_axis", [-1])
            (total,) = add("ReduceSum", [top, last], "total", wide, keepdims=1)
            (top,) = add("Div", [top, total], "normalized", wide)
        (scores,) = add("Cast", [top], "scores", x.dtype, to=x.dtype.value)
        (ids,) = add("Cast", [chosen], "ids", ir.DataType.INT32, to=ir.DataType.INT32.value)
        rows = [
            add("Unsqueeze", [value, axis], role, kind)[0]
            for value, role, kind in (
                (x, "x.row", x.dtype),
                (ids, "ids.row", ir.DataType.INT32),
                (scores, "scores.row", x.dtype),
            )
        ]
        stored = [
            add_initializer(model, f"{node.name}.{role}.weight", weights.transpose(tensor, (0, 2, 1)))
            for role, tensor in (
                ("gate", weights.slice_(gate_up, 1, 0, width)),
                ("up", weights.slice_(gate_up, 1, width, 2 * width)),
                ("down", down),
            )
        ]
        (routed,) = add(TRT_MOE, [*rows, *stored], "experts", x.dtype, activation_type=_SILU)
        (y,) = add("Squeeze", [routed, axis], "flat", x.dtype)
        replace_node(model, node, steps, [y])
        model.graph.opset_imports[TENSORRT_DOMAIN] = 1


def _calls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == MIXTURE_OF_EXPERTS and node.domain == names.DOMAIN]


def find_shared_expert(experts: ir.Node) -> SharedExpert | None:
    """The shared expert added to ``experts``: sigmoid(gate) * SwiGLU(x) over the very same x; None if there is none."""
    routed = experts.outputs[0]
    addition = single_consumer(routed)
    if addition is None or addition.op_type != "Add" or addition.domain:
        return None
    weighted = is_op(other_operand(addition, routed), "Mul")
    if weighted is None or single_consumer(weighted.outputs[0]) is not addition:
        return None
    for gate_value, value in (weighted.inputs, list(reversed(weighted.inputs))):
        sigmoid, product = is_op(gate_value, "Sigmoid"), is_op(value, "MatMul")
        if sigmoid is None or product is None or gate_value is None or sigmoid.inputs[0] is None:
            continue
        if static_dim(gate_value, -1) != 1 or product.inputs[1] is None or product.inputs[1].const_value is None:
            continue
        merged = _swiglu_weight(product.inputs[0], experts.inputs[0])
        if merged is not None:
            return SharedExpert(merged, product.inputs[1].const_value, sigmoid.inputs[0], addition)
    return None


def _swiglu_weight(value: ir.Value | None, x: ir.Value | None) -> ir.TensorProtocol | None:
    """The weight [C, 2I] of ``value`` = Swish(first half of x @ weight) * second half; None if it is anything else."""
    gated = is_op(value, "Mul")
    if gated is None:
        return None
    for activated, up in (gated.inputs, list(reversed(gated.inputs))):
        swish = is_op(activated, "Swish")
        gate = swish.inputs[0] if swish is not None and "alpha" not in swish.attributes else None
        split = is_op(gate, "Split")
        if split is None or up is None or list(split.outputs) != [gate, up]:
            continue
        if split.inputs[0] is None or len(split.inputs) > 1 or int_attribute(split, "axis", 0) not in (-1, 1):
            continue
        product = is_op(split.inputs[0], "MatMul")
        if product is not None and product.inputs[0] is x and product.inputs[1] is not None:
            return product.inputs[1].const_value
    return None
