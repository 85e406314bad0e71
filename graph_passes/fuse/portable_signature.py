"""Give inputs and outputs the portable form's names, symbolic dimensions and order."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.infra import FusionPass
from qwenforge.graph_passes.signature import Signature, detect_signature


class PortableSignature(FusionPass):
    """Rename, re-dimension and order the graph's inputs and outputs as :mod:`qwenforge.names` documents them."""

    name: ClassVar[str] = "portable_signature"

    def run(self, model: ir.Model) -> None:
        signature = detect_signature(model)
        if signature.form != "in_place" or signature.logits_index is None or signature.position_ids is None:
            self.fail("the graph is not in the in-place form: its attention was not fused")
            return
        before = [str(value) for value in (*model.graph.inputs, *model.graph.outputs)]
        _unify_dimensions(model, signature)
        _rename(model, signature)
        inputs = {value.name: value for value in model.graph.inputs}
        outputs = {value.name: value for value in model.graph.outputs}
        layers = range(len(signature.layers))
        past = [name(layer) for layer in layers for name in (names.past_key, names.past_value)]
        present = [name(layer) for layer in layers for name in (names.present_key, names.present_value)]
        tokens = {
            names.INPUT_IDS: [names.BATCH, names.SEQUENCE],
            names.POSITION_IDS: [names.BATCH, names.SEQUENCE],
            names.CACHE_POSITION: [names.BATCH],
            names.LOGITS_INDEX: [names.BATCH, names.LOGITS_COUNT],
        }
        for name, shape in tokens.items():
            inputs[name].shape = ir.Shape(shape)
        _reorder(model.graph.inputs, [inputs[name] for name in (*tokens, *past)])
        _reorder(model.graph.outputs, [outputs[name] for name in (names.LOGITS, *present)])
        after = [str(value) for value in (*model.graph.inputs, *model.graph.outputs)]
        self.matches = int(before != after)


def _unify_dimensions(model: ir.Model, signature: Signature) -> None:
    """Call the batch and sequence dimensions by our names wherever a value's shape mentions them."""
    tokens = next(value for value in model.graph.inputs if value.name == signature.input_ids)
    if tokens.shape is None:
        return
    known = dict(zip(tokens.shape, (names.BATCH, names.SEQUENCE), strict=True))
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([dim if isinstance(dim, int) else known.get(dim, dim) for dim in value.shape])


def _rename(model: ir.Model, signature: Signature) -> None:
    wanted = {
        signature.input_ids: names.INPUT_IDS,
        str(signature.position_ids): names.POSITION_IDS,
        str(signature.cache_position): names.CACHE_POSITION,
        str(signature.logits_index): names.LOGITS_INDEX,
        signature.logits: names.LOGITS,
    }
    for layer, cache in enumerate(signature.layers):
        wanted[str(cache.key_input)], wanted[str(cache.value_input)] = names.past_key(layer), names.past_value(layer)
        wanted[cache.key_output], wanted[cache.value_output] = names.present_key(layer), names.present_value(layer)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in wanted and value.name != wanted[value.name]:
            value.name = wanted[value.name]


def _reorder(values: MutableSequence[ir.Value], ordered: list[ir.Value]) -> None:
    values[:] = ordered
