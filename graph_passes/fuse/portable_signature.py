"""Give inputs and outputs the portable form's names, symbolic dimensions and order."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import ClassVar

import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.infra import FusionPass
from qwenforge.graph_passes.signature import Signature, detect_signature


class PortableSignature(FusionPass):
    """Rename, re-dimension and order the graph's inputs and outputs as :mod:`qwenforge.names` documents them.

    Sizes that the graph was exported with (one token a call, say) stay in its shapes, and are told.
    """

    name: ClassVar[str] = "portable_signature"

    def run(self, model: ir.Model) -> None:
        signature = detect_signature(model)
        if signature.form != "in_place" or signature.position_ids is None:
            self.fail("the graph is not in the in-place form: its attention was not fused")
            return
        if signature.logits_index is None:
            self.fail("the graph does not choose the tokens whose logits it computes")
            return
        mask = next((value for value in model.graph.inputs if value.name == signature.attention_mask), None)
        if mask is not None and mask.uses():
            self.fail(f"the graph still reads its padding mask {mask.name}: its attention was not fused")
            return
        before = [str(value) for value in (*model.graph.inputs, *model.graph.outputs)]
        _unify_dimensions(model, signature)
        _rename(model, signature)
        inputs = {value.name: value for value in model.graph.inputs}
        outputs = {value.name: value for value in model.graph.outputs}
        layers = range(len(signature.layers))
        past = [name(layer) for layer in layers for name in (names.past_key, names.past_value)]
        present = [name(layer) for layer in layers for name in (names.present_key, names.present_value)]
        batch, sequence = _dimensions(inputs[names.INPUT_IDS], names.BATCH, names.SEQUENCE)
        tokens = {
            names.INPUT_IDS: [batch, sequence],
            names.POSITION_IDS: [batch, sequence],
            names.CACHE_POSITION: [batch],
            names.LOGITS_INDEX: [batch, names.LOGITS_COUNT],
        }
        for name, shape in tokens.items():
            inputs[name].shape = ir.Shape(shape)
        for value in (*(inputs[name] for name in past), *(outputs[name] for name in present)):
            value.shape = ir.Shape(_dimensions(value, batch, None, names.CAPACITY, None))
        logits = outputs[names.LOGITS]
        logits.shape = ir.Shape(_dimensions(logits, batch, names.LOGITS_COUNT, None))
        if isinstance(batch, int) or isinstance(sequence, int):
            self.fail(f"the graph was exported for {names.INPUT_IDS} of the fixed sizes [{batch}, {sequence}] only")
        _reorder(model.graph.inputs, [inputs[name] for name in (*tokens, *past)])
        _reorder(model.graph.outputs, [outputs[name] for name in (names.LOGITS, *present)])
        after = [str(value) for value in (*model.graph.inputs, *model.graph.outputs)]
        self.matches = int(before != after)


def _dimensions(value: ir.Value, *wanted: int | str | ir.SymbolicDim | None) -> list[int | str | ir.SymbolicDim | None]:
    """The dimensions of ``value``: its fixed ones, and for others the ``wanted`` name, if any."""
    have = list(value.shape) if value.shape is not None else [None] * len(wanted)
    return [dim if isinstance(dim, int) or name is None else name for dim, name in zip(have, wanted, strict=True)]


def _unify_dimensions(model: ir.Model, signature: Signature) -> None:
    """Call the batch and sequence dimensions by our names wherever a value's shape mentions them."""
    tokens = next(value for value in model.graph.inputs if value.name == signature.input_ids)
    if tokens.shape is None:
        return
    ours = zip(tokens.shape, (names.BATCH, names.SEQUENCE), strict=True)
    known: dict[str | None, str] = {
        dim.value: name for dim, name in ours if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    }
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape(
                    [dim if isinstance(dim, int) else known.get(dim.value, dim) for dim in value.shape]
                )


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
    crossing = {*model.graph.inputs, *model.graph.outputs}
    made = [output for node in model.graph for output in node.outputs]
    taken = {value.name for value in (*made, *model.graph.initializers.values(), *crossing)} | set(wanted.values())
    for value in (*made, *model.graph.initializers.values()):
        if value not in crossing and value.name in set(wanted.values()):
            value.name = _free_name(value.name, taken)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in wanted and value.name != wanted[value.name]:
            value.name = wanted[value.name]


def _free_name(name: str, taken: set[str | None]) -> str:
    """``name`` with the first number that makes it one of its own."""
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    taken.add(f"{name}_{number}")
    return f"{name}_{number}"


def _reorder(values: MutableSequence[ir.Value], ordered: list[ir.Value]) -> None:
    values[:] = ordered
