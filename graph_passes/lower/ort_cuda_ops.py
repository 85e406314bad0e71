"""Our kernels as custom ops of ONNX Runtime: the nodes of plugins/*/op.yaml, without what TensorRT's parser needs.

Inputs stand at their places in the op.yaml; one that the attributes make absent is an empty name, or left out at the
end.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from qwenforge import op_spec
from qwenforge.graph_passes.infra import (
    FusionPass,
    float_attribute,
    int_attribute,
    is_op,
    single_consumer,
    static_dim,
)
from qwenforge.graph_passes.lower.qkv_packing import PackQKV
from qwenforge.graph_passes.lower.tensorrt_attention import PluginAttention, require_fields
from qwenforge.graph_passes.lower.tensorrt_moe import PluginExperts

_ATTENTION = (op_spec.NAMESPACE, "QwenForgeAttention")
_QUERY, _KEY, _QUERY_NORM = 0, 1, 9


class CustomAttention(PluginAttention):
    """Replace every attention function by ``qwenforge::QwenForgeAttention``."""

    name: ClassVar[str] = "ort_cuda_attention"

    def place(self, inputs: list[ir.Value | None]) -> list[ir.Value | None]:
        """Each input at its place in the op.yaml: the scales stand behind the norms of heads."""
        return [*inputs[:_QUERY_NORM], None, None, *inputs[_QUERY_NORM:]] if len(inputs) > _QUERY_NORM else inputs

    def node_attributes(
        self, spec: op_spec.OpSpec, fields: dict[str, int | float], node: ir.Node
    ) -> dict[str, int | float | str]:
        require_fields(spec, fields, node)
        return {**fields}


class CustomExperts(PluginExperts):
    """Replace every expert function, its shared expert included, by ``qwenforge::QwenForgeMoE``."""

    name: ClassVar[str] = "ort_cuda_experts"

    def place(self, inputs: list[ir.Value | None]) -> list[ir.Value | None]:
        """Each input at its place in the op.yaml; those that are absent at the end are left out."""
        last = max(index for index, value in enumerate(inputs) if value is not None)
        return inputs[: last + 1]

    def node_attributes(
        self, spec: op_spec.OpSpec, fields: dict[str, int | float], node: ir.Node
    ) -> dict[str, int | float | str]:
        require_fields(spec, fields, node)
        return {**fields}


class FoldHeadNorms(FusionPass):
    """Take Qwen3's norms of the heads of q and k into the attention op, which normalizes what it turns anyway.

    Both have to be what the op does: over the head size, in fp32, of one epsilon, by a weight for each channel.
    """

    name: ClassVar[str] = "ort_cuda_head_norms"

    def run(self, model: ir.Model) -> None:
        for node in list(model.graph):
            if (node.domain, node.op_type) != _ATTENTION or node.attributes["qk_norm"].as_int():
                continue
            query, key = (_joined_norm(node.inputs[index]) for index in (_QUERY, _KEY))
            if query is None and key is None:
                continue
            if query is None or key is None:
                self.fail("only one of q and k is normalized", node)
                continue
            size = node.attributes["head_size"].as_int()
            heads = (node.attributes["num_heads"].as_int(), node.attributes["num_key_value_heads"].as_int())
            reasons = [_obstacle(norm, count, size) for norm, count in zip((query, key), heads, strict=True)]
            epsilons = [float_attribute(norm, "epsilon", 1e-5) for norm in (query, key)]
            if epsilons[0] != epsilons[1]:
                reasons.append("the norms of q and k have different epsilons")
            if reason := next(filter(None, reasons), None):
                self.fail(reason, node)
                continue
            self._rewrite(node, query, key, epsilons[0])

    def _rewrite(self, node: ir.Node, query: ir.Node, key: ir.Node, epsilon: float) -> None:
        for index, norm in ((_QUERY, query), (_KEY, key)):
            split = is_op(norm.inputs[0], "Reshape")
            assert split is not None
            node.replace_input_with(index, split.inputs[0])
        node.resize_inputs(max(_QUERY_NORM + 2, len(node.inputs)))
        node.replace_input_with(_QUERY_NORM, query.inputs[1])
        node.replace_input_with(_QUERY_NORM + 1, key.inputs[1])
        node.attributes["qk_norm"] = ir.AttrInt64("qk_norm", 1)
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
        self.matches += 1


class PackCustomQKV(PackQKV):
    """Merge the projections in front of ``QwenForgeAttention``, which then finds k and v behind q."""

    name: ClassVar[str] = "ort_cuda_pack_qkv"
    operator: ClassVar[tuple[str, str]] = _ATTENTION

    def packed(self, attention: ir.Node) -> None:
        attention.attributes["packed_qkv"] = ir.AttrInt64("packed_qkv", 1)


def _joined_norm(value: ir.Value | None) -> ir.Node | None:
    """The norm behind ``value`` = Reshape(RMSNormalization(Reshape(...))), of which nothing else is read."""
    joined = is_op(value, "Reshape")
    norm = is_op(joined.inputs[0], "RMSNormalization") if joined is not None else None
    split = is_op(norm.inputs[0], "Reshape") if norm is not None else None
    if value is None or joined is None or norm is None or split is None:
        return None
    alone = single_consumer(norm.outputs[0]) is joined and single_consumer(split.outputs[0]) is norm
    return norm if alone and single_consumer(value) is not None else None


def _obstacle(norm: ir.Node, heads: int, size: int) -> str | None:
    """Why ``norm`` is not the op's, None when it is."""
    split = is_op(norm.inputs[0], "Reshape")
    assert split is not None
    flat, apart, weight = split.inputs[0], split.outputs[0], norm.inputs[1]
    if [static_dim(apart, axis) for axis in (-2, -1)] != [heads, size] or static_dim(flat, -1) != heads * size:
        return "what is normalized is not [B, S, H, D], split from [B, S, H*D]"
    if flat is None or flat.shape is None or apart.shape is None or list(flat.shape[:2]) != list(apart.shape[:2]):
        return "batch and sequence change places before the norm"
    if int_attribute(norm, "axis", -1) not in (-1, 3):
        return "the norm is not over the head size"
    if int_attribute(norm, "stash_type", ir.DataType.FLOAT) != ir.DataType.FLOAT:
        return "the norm does not compute in fp32"
    if weight is None or weight.const_value is None or static_dim(weight, 0) != size or len(weight.shape or ()) != 1:
        return "the norm's weight is no constant of one number for each channel"
    if weight.dtype != flat.dtype:
        return "the norm's weight is of another dtype than what it scales"
    return None
