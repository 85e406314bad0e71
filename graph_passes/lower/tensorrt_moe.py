"""``qwenforge::MixtureOfExperts`` and the shared expert added to it for TensorRT: our plugin, or TensorRT's layer.

The plugin takes the shared expert as more experts of the routed ones' width I: its intermediate channels are cut into
ceil(Is / I) slices, the last filled up with zeros, each chosen for every token with weight sigmoid(gate). Slices of a
SwiGLU along its channels add up to the whole, because every channel is computed on its own until the last product sums
over them.

TensorRT's layer (SM 100, 103, 110) takes the chosen experts and their weights; the router and the shared expert stay
ordinary operators beside it.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge import names, op_spec
from qwenforge.errors import UnsupportedError
from qwenforge.exporter import weights
from qwenforge.exporter.quantized_weights import QuantizedWeight, as_quantized
from qwenforge.graph_passes.functions import MIXTURE_OF_EXPERTS, QUANTIZED_EXPERTS
from qwenforge.graph_passes.infra import FusionPass, add_initializer, constant, constant_value, replace_node, tag
from qwenforge.graph_passes.lower.expert_packing import pack_down, pack_gate_up, shared_slices
from qwenforge.graph_passes.lower.quantized_experts import (
    ROW_GROUP,
    WEIGHT_TYPES,
    QuantizedExperts,
    fits_behind,
    obstacle,
    pack_experts,
)
from qwenforge.graph_passes.lower.shared_expert import SharedExpert, find_shared_expert
from qwenforge.graph_passes.lower.tensorrt_attention import TENSORRT_DOMAIN, plugin_attributes
from qwenforge.tensorrt_choice import LAYOUT_VERSION

TRT_MOE = "TRT_MoE"
_SILU = 1
"""``activation_type`` of TRT_MoE."""


class PluginExperts(FusionPass):
    """Replace every expert function, with its shared expert if there is one, by the plugin.

    Quantized weights are packed as they are. A shared expert that is quantized otherwise than the routed ones stays
    beside the plugin as ordinary operators.
    """

    name: ClassVar[str] = "tensorrt_plugin_experts"

    def run(self, model: ir.Model) -> None:
        spec = op_spec.load("moe")
        for node in _calls(model):
            x, logits, gate_up, down = node.inputs[:4]
            first, second = (value.const_value if value is not None else None for value in (gate_up, down))
            if x is None or x.dtype is None or logits is None or first is None or second is None:
                self.fail("the expert weights are not initializers", node)
                continue
            if x.dtype != logits.dtype:
                self.fail("the router's logits are of another dtype than the tokens", node)
                continue
            experts, width, hidden = weights.dims(first)[0], weights.dims(first)[1] // 2, weights.dims(first)[2]
            routed, scales = _quantized(node, first, second)
            shared = find_shared_expert(node)
            if shared is not None and not _joins(shared, routed, scales):
                self.fail("the shared expert is quantized otherwise than the routed ones and stays beside them", node)
                shared = None
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
                "weight_type": WEIGHT_TYPES[routed.format] if routed is not None else 0,
                "group_size": routed.group_size if routed is not None else ROW_GROUP,
                "layout_version": LAYOUT_VERSION,
            }
            fields = self.node_attributes(spec, attributes, node)
            packed = _packed(first, second, routed, shared, x.dtype)
            if scales is not None:
                more = [shared.hidden.scale] * slices if shared is not None and shared.hidden is not None else []
                numbers = np.concatenate([scales, np.array(more, np.float32)])
                packed["activation_scales"] = ir.tensor(numbers, name="activation_scales")
            plugin = ir.node(
                spec.name,
                self._inputs(model, spec, node, shared, packed),
                fields,
                domain=op_spec.NAMESPACE,
                name=node.name,
            )
            tag(plugin, self.name)
            if shared is None:
                replace_node(model, node, [plugin], plugin.outputs)
            else:
                # The sum's place: by then the gate of the shared expert is computed too.
                replace_node(model, shared.addition, [plugin], plugin.outputs)
            model.graph.opset_imports[op_spec.NAMESPACE] = 1
            self.matches += 1

    def _inputs(
        self,
        model: ir.Model,
        spec: op_spec.OpSpec,
        node: ir.Node,
        shared: SharedExpert | None,
        packed: dict[str, ir.TensorProtocol],
    ) -> list[ir.Value | None]:
        """The node's inputs in the order of ``spec``, as :meth:`place` wants the absent ones."""
        given: dict[str, ir.Value] = {}
        for name, value in (("hidden_states", node.inputs[0]), ("router_logits", node.inputs[1])):
            assert value is not None
            given[name] = value
        if shared is not None:
            given["shared_gate_logits"] = shared.gate_logits
        sources = {"gate_up": node.inputs[2], "down": node.inputs[3]}
        for name, tensor in packed.items():
            source = next((value for part, value in sources.items() if name.startswith(part)), None)
            prefix = source.name if source is not None else node.name
            role = {"weights": "packed", "scales": "scales"}[name.rpartition("_")[2]]
            given[name] = add_initializer(
                model, f"{prefix}.{role}" if source is not None else f"{node.name}.{name}", tensor
            )
        return self.place([given.get(tensor.name) for tensor in spec.inputs])

    def place(self, inputs: list[ir.Value | None]) -> list[ir.Value | None]:
        """The inputs as the target lists them: TensorRT's plugins take those that are there, one after the other."""
        return [value for value in inputs if value is not None]

    def node_attributes(
        self, spec: op_spec.OpSpec, fields: dict[str, int | float], node: ir.Node
    ) -> dict[str, int | float | str]:
        """What the node is given: ``fields``, and here what TensorRT's parser finds the plugin by."""
        return plugin_attributes(spec, fields, node)


def _quantized(
    node: ir.Node, gate_up: ir.TensorProtocol, down: ir.TensorProtocol
) -> tuple[QuantizedExperts | None, npt.NDArray[np.float32] | None]:
    """The quantized routed experts of ``node`` if they are, and the scales of their tokens and activated channels.

    Raises:
        UnsupportedError: they are quantized as the plugin's cannot be; the message says what it takes.
    """
    first, second = as_quantized(gate_up), as_quantized(down)
    routed = QuantizedExperts(first, second) if first is not None and second is not None else None
    problem = obstacle(routed) if routed is not None else None
    if routed is None and (first is not None or second is not None):
        problem = "only one of their two matrices is quantized; quantize both or none"
    tokens = node.op_type == QUANTIZED_EXPERTS
    if problem is None and tokens != (routed is not None and routed.format == "fp8"):
        problem = (
            "their tokens are FP8 and their weights are not; quantize both to fp8"
            if tokens
            else "their weights are FP8 and their tokens are not, and it multiplies FP8 by FP8 alone; calibrate for "
            "fp8, take a checkpoint with static input scales, quantize the experts to int8"
        )
    if problem is not None:
        other = "portable" if "fp8" in {found.format for found in (first, second) if found is not None} else "ort-cpu"
        raise UnsupportedError(
            f"the plugin cannot compute the experts of node {node.name}: {problem}, or use --target {other}."
        )
    if not tokens:
        return routed, None
    scales = constant_value(node.inputs[4])
    if scales is None:
        raise UnsupportedError(f"the activation scales of node {node.name} are not constants; calibrate again.")
    return routed, scales.astype(np.float32)


def _joins(shared: SharedExpert, routed: QuantizedExperts | None, scales: npt.NDArray[np.float32] | None) -> bool:
    """Whether the shared expert computes as the routed ones do, so that it can be more of them."""
    matrices = _shared_quantized(shared)
    if routed is None:
        return matrices == [None, None] and shared.tokens is None and shared.hidden is None
    gate_up, down = matrices
    if gate_up is None or down is None or not fits_behind(QuantizedExperts(gate_up, down), routed):
        return False
    if scales is None:
        return shared.tokens is None and shared.hidden is None
    roundings = (shared.tokens, shared.hidden)
    if any(rounding is None or rounding.dtype != ir.DataType.FLOAT8E4M3FN for rounding in roundings):
        return False
    return shared.tokens is not None and bool(np.float32(shared.tokens.scale) == scales[0])


def _shared_quantized(shared: SharedExpert) -> list[QuantizedWeight | None]:
    return [as_quantized(weights.transpose(matrix, (1, 0))) for matrix in (shared.gate_up, shared.down)]


def _packed(
    gate_up: ir.TensorProtocol,
    down: ir.TensorProtocol,
    routed: QuantizedExperts | None,
    shared: SharedExpert | None,
    dtype: ir.DataType,
) -> dict[str, ir.TensorProtocol]:
    """Weights, and scales where they are quantized, by the names of the plugin's inputs."""
    if routed is None:
        width = weights.dims(down)[2]
        slices = shared_slices(shared.gate_up, shared.down, width) if shared is not None else None
        return {"gate_up_weights": pack_gate_up(gate_up, slices), "down_weights": pack_down(down, slices)}
    more = None
    if shared is not None:
        first, second = _shared_quantized(shared)
        assert first is not None and second is not None
        more = QuantizedExperts(first, second)
    packed = pack_experts(routed, more, dtype)
    return {
        "gate_up_weights": packed.gate_up,
        "down_weights": packed.down,
        "gate_up_scales": packed.gate_up_scales,
        "down_scales": packed.down_scales,
    }


class NativeExperts(FusionPass):
    """Replace every expert function by a router of plain operators and TensorRT's own layer."""

    name: ClassVar[str] = "tensorrt_native_experts"

    def run(self, model: ir.Model) -> None:
        for node in _calls(model):
            x, logits, gate_up, down = node.inputs[:4]
            first, second = (value.const_value if value is not None else None for value in (gate_up, down))
            if x is None or x.dtype is None or logits is None or first is None or second is None:
                self.fail("the expert weights are not initializers", node)
                continue
            if node.op_type == QUANTIZED_EXPERTS or as_quantized(first) is not None or as_quantized(second) is not None:
                raise UnsupportedError(
                    f"the experts of node {node.name} are quantized, and TensorRT's own layer is used here with 16-bit "
                    "weights only; use --experts plugin, or keep the experts unquantized."
                )
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
    kinds = (MIXTURE_OF_EXPERTS, QUANTIZED_EXPERTS)
    return [node for node in model.graph if node.op_type in kinds and node.domain == names.DOMAIN]
