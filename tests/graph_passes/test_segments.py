"""Pieces of a model, run one after the other, against the whole."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.errors import GraphError
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.segments import split_by_layer
from support.cached_decoder import load_session, random_tokens
from support.checkpoints import Kind
from support.exported_models import MIXED, exported, in_memory
from support.portable_models import portable_model, random_model
from support.small_graphs import Array, answers, graph_from_text, normal

MODELS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "num_hidden_layers": 3}),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3}),
    "qwen3, head size 12": ("qwen3", {"head_dim": 12}),
}


def _model(name: str, target: str) -> ir.Model:
    if name == "exported":
        return lower(in_memory(exported("qwen2_moe", **MIXED).portable()), target)
    kind, config = MODELS[name]
    return lower(portable_model(random_model(kind, **config)), target)


def _feeds(model: ir.Model, batch: int, start: int, count: int) -> dict[str, Array]:
    tokens = np.array([random_tokens(count, seed=row) for row in range(batch)])
    steps = np.tile(np.arange(count), (batch, 1))
    feeds: dict[str, Array] = {
        "input_ids": tokens,
        "position_ids": start + steps,
        "cache_position": np.full(batch, start),
        "logits_index": steps,
    }
    for seed, value in enumerate(v for v in model.graph.inputs if v.name not in feeds):
        assert value.name is not None and value.shape is not None
        feeds[value.name] = normal(batch, int(value.shape[1]), 16, int(value.shape[3]), seed=seed)  # type: ignore[arg-type]
    return feeds


def _run(model: ir.Model, values: dict[str, Array]) -> dict[str, Array]:
    session = load_session(model, optimize=False)
    outputs = [item.name for item in session.get_outputs()]
    fed = {item.name: values[item.name] for item in session.get_inputs()}
    return dict(zip(outputs, session.run(outputs, fed), strict=True))


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("name", [*MODELS, "exported"])
def test_chained_pieces_answer_bit_for_bit_as_the_whole(name: str, target: str) -> None:
    model = _model(name, target)
    pieces = split_by_layer(model)
    for batch, start, count in ((2, 0, 5), (2, 4, 1), (1, 4, 3)):
        feeds = _feeds(model, batch, start, count)
        expected = _run(model, feeds)
        values = dict(feeds)
        for piece in pieces:
            values |= _run(piece, values)
        assert all(np.array_equal(values[name], array) for name, array in expected.items())


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("name", [*MODELS, "exported"])
def test_every_node_is_in_exactly_one_piece_and_every_layer_is_one(name: str, target: str) -> None:
    model = _model(name, target)
    pieces = split_by_layer(model)
    counted = Counter(node.name for piece in pieces for node in piece.graph)
    assert counted == Counter(node.name for node in model.graph)
    layers = sum((value.name or "").endswith(".key") for value in model.graph.inputs)
    assert len(pieces) == layers + 2
    for index, piece in enumerate(pieces):
        found = {match[1] for node in piece.graph if (match := re.match(r"model\.layers\.(\d+)\.", node.name or ""))}
        assert found == ({str(index - 1)} if 0 < index <= layers else set())


def test_pieces_hold_the_weights_they_use_and_no_copies() -> None:
    model = _model("qwen2_moe", "ort-cpu")
    held = {id(value.const_value) for value in model.graph.initializers.values()}
    for index, piece in enumerate(split_by_layer(model)):
        assert {id(value.const_value) for value in piece.graph.initializers.values()} <= held
        others = [name for name in piece.graph.initializers if name.startswith("model.layers.")]
        assert all(name.startswith(f"model.layers.{index - 1}.") for name in others)


def _named(text: str, **renamed: str) -> ir.Model:
    model = graph_from_text(text)
    for node in model.graph:
        node.name = renamed.get(str(node.name), node.name)
    return model


CHAIN = """(float[N] x) => (float[N] y, float[N] t)
    { e = Neg(x)  s = Abs(x)  a = Exp(e)  m = Tanh(a)  b = Mul(m, s)
      n = Relu(b)  c = Sigmoid(x)  t = Neg(b)  y = Add(n, c) }"""


def test_node_between_layers_goes_with_the_first_piece_that_needs_it() -> None:
    model = _named(CHAIN, a="model.layers.0.a", b="model.layers.1.b")
    pieces = split_by_layer(model)
    assert [[node.outputs[0].name for node in piece.graph] for piece in pieces] == [
        ["e", "s"],
        ["a"],
        ["m", "b"],
        ["n", "c", "t", "y"],
    ]
    x = normal(4)
    values: dict[str, Array] = {"x": x}
    for piece in pieces:
        values |= _run(piece, values)
    for name, expected in zip(("y", "t"), answers(model, x=x), strict=True):
        assert np.array_equal(values[name], expected)


def test_model_without_layers_is_one_piece() -> None:
    assert len(split_by_layer(_named(CHAIN))) == 1


def test_layers_in_another_order_are_refused() -> None:
    with pytest.raises(GraphError, match=r"layer 0 reads what node model.layers.1.a of a later layer makes"):
        split_by_layer(_named(CHAIN, a="model.layers.1.a", b="model.layers.0.b"))
