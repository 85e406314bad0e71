"""Project only the tokens whose logits are wanted onto the vocabulary, in fp32.

During prefill one token a row is needed, not S: the vocabulary projection is the widest matrix of the model.
``logits_index`` [B, N] picks the tokens, so one graph serves generation (N = 1) and scoring (N = S).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qwenforge import names
from qwenforge.graph_passes.infra import FusionPass, constant, is_op, rank, tag
from qwenforge.graph_passes.signature import detect_signature


class SelectLogits(FusionPass):
    """Gather the tokens named by a new ``logits_index`` input in front of the vocabulary projection."""

    name: ClassVar[str] = "select_logits"

    def run(self, model: ir.Model) -> None:
        signature = detect_signature(model)
        if signature.logits_index is not None:
            return
        logits = next(value for value in model.graph.outputs if value.name == signature.logits)
        tokens = next(value for value in model.graph.inputs if value.name == signature.input_ids)
        cast = is_op(logits, "Cast")
        projection = is_op(cast.inputs[0] if cast is not None else logits, "MatMul")
        hidden = projection.inputs[0] if projection is not None else None
        if projection is None or hidden is None or rank(hidden) != 3 or rank(projection.inputs[1]) != 2:
            self.fail(
                "the logits are not the product of a [batch, sequence, hidden] tensor and a matrix", logits.producer()
            )
            return
        if not _same_tokens(hidden, tokens):
            self.fail("not every token of the input is projected onto the vocabulary, or in another order", projection)
            return
        index = ir.Value(
            name=names.LOGITS_INDEX,
            shape=ir.Shape([names.BATCH, names.LOGITS_COUNT]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        model.graph.inputs.append(index)
        axis = constant(model, "logits_index.axis", np.array([-1], np.int64))
        unsqueeze = tag(ir.node("Unsqueeze", [index, axis], name="logits_index.unsqueeze"), self.name)
        gather = tag(
            ir.node("GatherND", [hidden, unsqueeze.outputs[0]], {"batch_dims": 1}, name="logits_index.gather"),
            self.name,
        )
        hidden_size = hidden.shape[2] if hidden.shape is not None else None
        unsqueeze.outputs[0].name, gather.outputs[0].name = "logits_index.unsqueezed", "logits_index.hidden"
        unsqueeze.outputs[0].shape = ir.Shape([names.BATCH, names.LOGITS_COUNT, 1])
        unsqueeze.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        gather.outputs[0].shape = ir.Shape([names.BATCH, names.LOGITS_COUNT, hidden_size])
        gather.outputs[0].type = hidden.type
        model.graph.insert_before(projection, [unsqueeze, gather])
        projection.replace_input_with(0, gather.outputs[0])
        vocabulary = logits.shape[2] if logits.shape is not None else None
        chosen = ir.Shape([names.BATCH, names.LOGITS_COUNT, vocabulary])
        projection.outputs[0].shape = chosen
        logits.shape = chosen
        if logits.dtype != ir.DataType.FLOAT:
            self._cast_to_float(model, logits)
        self.matches = 1

    def _cast_to_float(self, model: ir.Model, logits: ir.Value) -> None:
        node = tag(ir.node("Cast", [logits], {"to": ir.DataType.FLOAT.value}, name="logits.cast"), self.name)
        output = node.outputs[0]
        output.name, logits.name = logits.name, "logits.half"
        output.shape, output.type = logits.shape, ir.TensorType(ir.DataType.FLOAT)
        producer = logits.producer()
        assert producer is not None
        model.graph.insert_after(producer, node)
        model.graph.outputs[list(model.graph.outputs).index(logits)] = output


def _same_tokens(hidden: ir.Value, tokens: ir.Value) -> bool:
    """Whether ``hidden`` [B, S, C] has a row for each of ``tokens`` [B, S], by their dimensions."""
    if hidden.shape is None or tokens.shape is None:
        return False
    pairs = list(zip(hidden.shape, tokens.shape, strict=False))
    return all(have == want and (isinstance(have, int) or have.value is not None) for have, want in pairs)
