"""Zero points and groups of INT8 as INT4 blocks for TensorRT: the same values to the bit, and the same answers."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.lower.tensorrt_int4_blocks import GroupOffset, Int4Part
from qwenforge.graph_passes.quantize.apply import apply_plan
from support.cached_decoder import CachedDecoder, random_tokens
from support.portable_models import portable_model, random_model
from support.quantized_reference import Scheme, make_plan, quantize_dequantize
from support.tensorrt_choices import lowering
from support.tolerances import FLOAT32_REORDERED

CAPACITY = 32
TOKENS = random_tokens(24, seed=5)
DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
SCHEMES = {
    "zero points by 64": ("uint4", 64),
    "zero points by 128": ("uint4", 128),
    "zero points by row": ("uint4", None),
    "int8 by 64": ("int8", 64),
    "int8 by 128": ("int8", 128),
    "int4 by row": ("int4", None),
}


def _scheme(name: str, dtype: str = "float32") -> Scheme:
    weight, group = SCHEMES[name]
    return Scheme(weight, group, dtype=dtype)  # type: ignore[arg-type]


@functools.cache
def _source() -> Any:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    return random_model("qwen2", rounded_to="bfloat16", num_hidden_layers=1, **sizes)


def _quantized(scheme: Scheme) -> ir.Model:
    model = portable_model(_source(), dtype=DTYPES[scheme.dtype])
    apply_plan(model, make_plan(_source(), scheme))
    return model


def _lowered(scheme: Scheme, how: str) -> ir.Model:
    choice = lowering(how)
    return lower(_quantized(scheme), choice.target, choice=choice, capacity=CAPACITY)


def _wide(value: ir.Value | None) -> np.ndarray[Any, Any]:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def _matrix_of(model: ir.Model, part: str) -> tuple[np.ndarray[Any, Any], ir.Node | None]:
    """What the nodes for the weight whose name holds ``part`` multiply by, [N, K] in float64, from what is stored."""
    dequantize = next(
        node for node in model.graph if node.op_type == "DequantizeLinear" and part in str(node.outputs[0].name)
    )
    block = dequantize.attributes["block_size"].as_int()
    assert block in (64, 128) and len(dequantize.inputs) == 2
    codes = dequantize.inputs[0]
    assert codes is not None and codes.dtype == ir.DataType.INT4
    blocks = _wide(codes) * np.repeat(_wide(dequantize.inputs[1]), block, axis=0)
    (product,) = [node for node, _ in dequantize.outputs[0].uses()]
    tokens = product.inputs[0]
    twice = tokens is not None and (maker := tokens.producer()) is not None and maker.op_type == "Concat"
    values = np.add(*np.split(blocks, 2)) if twice else blocks
    (reader,) = {node for node, _ in product.outputs[0].uses()}
    correction = reader.inputs[1].producer() if reader.op_type == "Add" and reader.inputs[1] is not None else None
    if correction is None or not str(correction.name).endswith(".offsets"):
        return values.T, None
    factors, sums = _wide(correction.inputs[1]), correction.inputs[0]
    assert sums is not None and sums.producer() is not None
    if sums.producer().op_type == "Concat":  # type: ignore[union-attr]
        factors = np.add(*np.split(factors, 2))
    return (values + np.repeat(factors, len(values) // len(factors), axis=0)).T, correction


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_stored_stands_for_the_quantized_values_to_the_bit(name: str, dtype: str) -> None:
    scheme = _scheme(name, dtype)
    plan = make_plan(_source(), scheme)
    model = _lowered(scheme, "rtx")
    attention, mlp = _source().model.layers[0].self_attn, _source().model.layers[0].mlp
    for part, site, weight in (
        ("o_proj", "self_attn.o_proj", attention.o_proj.weight),
        ("down_proj", "mlp.down_proj", mlp.down_proj.weight),
    ):
        names = [f"model.layers.0.{site}.weight_{kind}" for kind in ("scales", "zero_points")]
        scales, points = (_tensor(plan.tensors.get(each)) for each in names)
        expected = quantize_dequantize(weight.detach().double(), scales, scheme.weight, scheme.group_size, points)
        stored, correction = _matrix_of(model, part)
        np.testing.assert_array_equal(stored, expected.numpy())
        assert (correction is not None) == (scheme.weight != "int4")


def _tensor(tensor: ir.TensorProtocol | None) -> Any:
    import torch

    return None if tensor is None else torch.from_numpy(np.array(tensor.numpy()))


def test_every_8_bit_code_is_the_sum_of_its_halves() -> None:
    codes = np.arange(-128, 128).astype(np.int8)[None]
    high, low = (Int4Part(high).apply([codes]) for high in (True, False))
    assert high.dtype == low.dtype == ml_dtypes.int4
    np.testing.assert_array_equal(16 * high.astype(int) + low.astype(int) + 8, codes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_groups_offset_is_exact_in_two_numbers(dtype: str) -> None:
    """Every finite positive scale of the dtype up to 16, by every zero point of 4 and of 8 bits."""
    kind = DTYPES[dtype]
    scales = np.arange(1, 0x7F80, dtype=np.uint16).view(kind.numpy())
    scales = scales[np.isfinite(scales) & (scales.astype(np.float32) <= 16)].astype(np.float32)
    for low, high in ((0, 16), (-128, 128)):
        points = np.arange(low, high)
        every = np.broadcast_to(scales[None], (len(points), len(scales)))
        each = np.broadcast_to(points[:, None], every.shape)
        rounded, rest = (GroupOffset(8, kind, rest).apply([every, each]) for rest in (False, True))
        exact = every.astype(np.float64) * (8 - each)
        np.testing.assert_array_equal(rounded.astype(np.float64) + rest.astype(np.float64), exact)
        assert (rest != 0).any()


@pytest.mark.parametrize("how", ["rtx", "plugin", "opset 20"])
@pytest.mark.parametrize("name", SCHEMES)
def test_lowered_graph_answers_as_the_portable_one(name: str, how: str) -> None:
    from qwenforge.graph_passes.lower.reference_bodies import expand_target_nodes

    expected = CachedDecoder(_quantized(_scheme(name)), capacity=CAPACITY).step([TOKENS])[0]
    final = _lowered(_scheme(name), how)
    expand_target_nodes(final)
    found = CachedDecoder(final, capacity=CAPACITY).step([TOKENS])[0]
    assert np.linalg.norm(found - expected) < FLOAT32_REORDERED * np.linalg.norm(expected)


def test_readers_of_one_value_share_its_group_sums_and_its_double() -> None:
    model = _lowered(_scheme("int8 by 128", "float16"), "rtx")
    operators = [node.op_type for node in model.graph]
    # Of what q, k and v read, what o reads, what gate and up read, and what down reads.
    assert operators.count("ReduceSum") == 4
    tagged = [node for node in model.graph if str(node.name).endswith(".twice")]
    assert len(tagged) == 4
    assert operators.count("DequantizeLinear") == 6


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 64), Scheme("int4", 128), Scheme("fp8")])
def test_what_tensorrt_takes_is_left_alone(scheme: Scheme) -> None:
    model = _lowered(scheme, "rtx")
    assert not [node for node in model.graph if "int4_blocks" in str(dict(node.metadata_props))]
    assert "ReduceSum" not in {node.op_type for node in model.graph}
