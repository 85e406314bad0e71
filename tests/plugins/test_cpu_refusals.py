"""What QuantizedLinear, QuantizedGatedMlp and QuantizedMixtureOfExperts refuse, each with a sentence of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from support.cpu_gated_mlp_case import GatedMlpCase
from support.cpu_linear_case import LinearCase
from support.cpu_mixture_case import Form, MixtureCase
from support.cpu_runs import NAME, Job, cpu_session

Change = Callable[[onnx.ModelProto], None]
LINEAR = LinearCase(rows=2, bias=True, norm=True, zero_points=True).job()
GATED_MLP = GatedMlpCase(rows=2, zero_points=True).job()
EXPERTS = MixtureCase(tokens=2, shared=Form(64)).job()


def attribute(name: str, value: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        (found,) = (each for each in model.graph.node[0].attribute if each.name == name)
        found.CopyFrom(helper.make_attribute(name, value))

    return change


def without_attribute(name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        kept = [each for each in model.graph.node[0].attribute if each.name != name]
        del model.graph.node[0].attribute[:]
        model.graph.node[0].attribute.extend(kept)

    return change


def shorter(name: str) -> Change:
    """The initializer without its last column."""

    def change(model: onnx.ModelProto) -> None:
        (found,) = (each for each in model.graph.initializer if each.name == name)
        array = numpy_helper.to_array(found)
        found.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array[..., :-1]), name))

    return change


def fed(name: str) -> Change:
    """The initializer as an input of the graph."""

    def change(model: onnx.ModelProto) -> None:
        (found,) = (each for each in model.graph.initializer if each.name == name)
        model.graph.input.append(helper.make_tensor_value_info(name, found.data_type, found.dims))
        model.graph.initializer.remove(found)

    return change


def left_out(name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        inputs = model.graph.node[0].input
        inputs[list(inputs).index(name)] = ""

    return change


REFUSED = {
    "linear of 3 bits": (LINEAR, attribute("bits", 3), "bits is 3, but has to be 4 or 8"),
    "linear of groups of 24": (
        *(LINEAR, attribute("block_size", 24)),
        "block_size is 24, but has to be a multiple of 16, at most 4096",
    ),
    "linear of groups of 8192": (
        *(LINEAR, attribute("block_size", 8192)),
        "block_size is 8192, but has to be a multiple of 16, at most 4096",
    ),
    "linear of no outputs": (LINEAR, attribute("N", 0), "N is 0, but has to be at least 1"),
    "linear without K": (LINEAR, without_attribute("K"), "the attribute K, an integer, is missing"),
    "linear without epsilon": (LINEAR, without_attribute("epsilon"), "the attribute epsilon, a float, is missing"),
    "linear of other codes": (LINEAR, shorter("weight"), "but 11200 elements are needed"),
    "linear of other scales": (LINEAR, shorter("scales"), "weight_scales is [100, 6], but 700 elements are needed"),
    "linear of other zero points": (
        *(LINEAR, shorter("zero_points")),
        "weight_zero_points is [100, 3], but 400 elements are needed",
    ),
    "linear of another bias": (LINEAR, shorter("bias"), "bias is [99], but 100 elements are needed"),
    "linear of another norm": (LINEAR, shorter("norm_weight"), "norm_weight is [199], but 200 elements are needed"),
    "linear of fed codes": (LINEAR, fed("weight"), "weight has to be an initializer of the model"),
    "linear of a fed norm": (LINEAR, fed("norm_weight"), "norm_weight has to be an initializer of the model"),
    "MLP of 2 bits": (GATED_MLP, attribute("down_bits", 2), "down_bits is 2, but has to be 4 or 8"),
    "MLP of groups of 40": (
        *(GATED_MLP, attribute("down_block_size", 40)),
        "down_block_size is 40, but has to be a multiple of 16, at most 4096",
    ),
    "MLP of other scales": (GATED_MLP, shorter("up_scales"), "up_scales is [160, 2], but 480 elements are needed"),
    "MLP of a fed up": (GATED_MLP, fed("up"), "up has to be an initializer of the model"),
    "more chosen than there are": (EXPERTS, attribute("k", 7), "k is 7, but there are 6 experts"),
    "no experts chosen": (EXPERTS, attribute("k", 0), "k is 0, but has to be at least 1"),
    "experts of 3 bits": (EXPERTS, attribute("bits", 3), "bits is 3, but has to be 4 or 8"),
    "experts of another router": (EXPERTS, shorter("router"), "router is [96, 5], but 576 elements are needed"),
    "experts of a fed router": (EXPERTS, fed("router"), "router has to be an initializer of the model"),
    "experts of other codes": (EXPERTS, shorter("down"), "but 18432 elements are needed"),
    "shared expert of groups of 8": (
        *(EXPERTS, attribute("shared_block_size", 8)),
        "shared_block_size is 8, but has to be a multiple of 16, at most 4096",
    ),
    "shared expert without its weight": (EXPERTS, left_out("shared_weight"), "shared_weight has to be there"),
    "shared expert without up": (EXPERTS, left_out("shared_up"), "shared_up and its scales have to be there"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_is_refused_when_the_session_is_made(name: str, cpu_library: Path) -> None:
    job, change, sentence = REFUSED[name]
    model = onnx.load_model_from_string(job.model)
    change(model)
    sentence = f"{model.graph.node[0].op_type} '{NAME}': .*{re.escape(sentence)}"
    with pytest.raises(Exception, match=sentence):
        cpu_session(cpu_library, model.SerializeToString(), 2)


@pytest.mark.parametrize(
    ("job", "shape", "sentence"),
    [
        (LINEAR, (2, 199), "the input is [2, 199], but its last extent has to be 200"),
        (GATED_MLP, (2, 95), "the input is [2, 95], but its last extent has to be 96"),
        (EXPERTS, (2, 97), "the input is [2, 97], but its last extent has to be 96"),
    ],
    ids=["linear", "MLP", "experts"],
)
def test_input_of_another_width_is_refused_when_it_comes(
    job: Job, shape: tuple[int, ...], sentence: str, cpu_library: Path
) -> None:
    session = cpu_session(cpu_library, job.model, 2)
    with pytest.raises(Exception, match=f"'{NAME}': {re.escape(sentence)}"):
        session.run(None, {"values": np.zeros(shape, np.float32)})
    assert np.isfinite(session.run(None, dict(job.feeds))[0]).all(), "the session goes on"


def test_residual_of_another_shape_is_refused(cpu_library: Path) -> None:
    job = LinearCase(rows=2, residual=True).job()
    session = cpu_session(cpu_library, job.model, 2)
    feeds = {"values": np.zeros((2, 200), np.float32), "residual": np.zeros((1, 200), np.float32)}
    with pytest.raises(Exception, match=re.escape("the residual is [1, 200], but the input is [2, 200]")):
        session.run(None, feeds)
