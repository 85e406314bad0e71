"""The DLPack binding, on a library of emulated kernels: the same bits as the tests' driver, and what it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qwenforge.bench.attention_call import Attention
from qwenforge.bench.dlpack import KernelError, Tensor
from qwenforge.bench.kernel_library import Experts, Kernels
from qwenforge.plugins.moe.packing import pack_float8, pack_int4, pack_int8
from support import emulated_kernels, simt
from support.attention_cases import DTYPES, EPSILON, Call, Inputs, Results, run
from support.emulated_kernels import aligned
from support.tolerances import FLOAT16

WHY = simt.why_missing() or ("the emulator is tested without a GPU" if simt.ON_GPU else "")
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "-")

TOKENS, HIDDEN, WIDTH, EXPERTS, SHARED, TOP_K = 6, 64, 128, 5, 2, 2


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return emulated_kernels.kernels()


def _placed(values: Any) -> torch.Tensor:
    given = torch.as_tensor(values)
    return aligned(*given.shape, dtype=given.dtype).copy_(given)


def _draw(*size: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return _placed((torch.randn(size, generator=generator) * 0.5).to(dtype))


def _experts(weight_type: str, dtype: torch.dtype) -> Experts:
    stored = EXPERTS + SHARED
    gate_up, down = _draw(stored, 2 * WIDTH, HIDDEN, dtype=dtype), _draw(stored, HIDDEN, WIDTH, dtype=dtype)
    experts = Experts(gate_up, down, EXPERTS, TOP_K, SHARED, True, weight_type=weight_type)
    if weight_type == "float":
        return experts
    pack = {"int8": pack_int8, "int4": lambda weight: pack_int4(weight, 64), "fp8": pack_float8}[weight_type]
    first, second = (pack(matrix.float().numpy()) for matrix in (gate_up, down))
    return replace(
        experts,
        gate_up=_placed(first[0]),
        down=_placed(second[0]),
        gate_up_scales=_placed(first[1]),
        down_scales=_placed(second[1]),
        activation_scales=_placed(np.full(1 + stored, 0.02, np.float32)) if weight_type == "fp8" else None,
        group_size=64 if weight_type == "int4" else 65536,
    )


@pytest.mark.parametrize(
    ("weight_type", "dtype"),
    [
        ("float", torch.float16),
        ("float", torch.bfloat16),
        ("int8", torch.bfloat16),
        ("int4", torch.float16),
        ("fp8", torch.float16),
    ],
)
def test_experts_are_called_as_the_driver_calls_them(weight_type: str, dtype: torch.dtype, kernels: Kernels) -> None:
    experts = _experts(weight_type, dtype)
    hidden, logits = _draw(TOKENS, HIDDEN, dtype=dtype), _draw(TOKENS, EXPERTS, dtype=dtype)
    gates, output = _draw(TOKENS, 1, dtype=dtype), _draw(TOKENS, HIDDEN, dtype=dtype)
    kernels.moe(hidden, logits, experts, output, gates, path="sixteen")
    kind = ["float", "int8", "int4", "fp8"].index(weight_type)
    numbers = [TOKENS, HIDDEN, WIDTH, EXPERTS, 0, EXPERTS, SHARED, TOP_K, 1, kind, experts.group_size, 2]
    tensors = [hidden, logits, experts.gate_up, experts.down, gates]
    tensors += [experts.gate_up_scales, experts.down_scales] if kind else []
    tensors += [experts.activation_scales] if weight_type == "fp8" else []
    raw = simt.run("moe", str(dtype).removeprefix("torch."), numbers, [t.view(torch.uint8).numpy() for t in tensors])
    assert output.view(torch.uint8).numpy().tobytes() == raw
    assert kernels.moe_path(hidden, logits, experts, output, gates) == "eight"


CALLS = {
    "linear": Call(starts=(3, 7)),
    "packed": Call(starts=(3, 7), packed=True, page_size=16, capacity=32),
    "normalized": Call(starts=(0,), sequence=3, norm=True, size=80, window=2),
    "int8": Call(starts=(5,), cache="int8", heads=6),
    "paged fp8, packed and normalized": Call(
        starts=(17, 2), sequence=2, capacity=48, page_size=16, cache="fp8", packed=True, norm=True
    ),
}


def _attention(call: Call, inputs: Inputs) -> dict[str, Any]:
    """Arguments of the binding for a call, in aligned memory."""
    query, key, value = (tensor.flatten(2) for tensor in (inputs.query, inputs.key, inputs.value))
    quantized, paged = call.cache != "float", call.page_size > 0
    layer = Attention(
        call.heads,
        call.kv_heads,
        call.scale,
        _placed(inputs.cos),
        _placed(inputs.sin),
        _placed(inputs.key_cache),
        _placed(inputs.value_cache),
        cache_type=call.cache,
        key_scales=_placed(inputs.key_scales) if quantized else None,
        value_scales=_placed(inputs.value_scales) if quantized else None,
        page_table=_placed(inputs.pages) if paged else None,
        query_norm=_placed(inputs.query_norm) if call.norm else None,
        key_norm=_placed(inputs.key_norm) if call.norm else None,
        epsilon=EPSILON,
        window=call.window,
    )
    return {
        "query": _placed(torch.cat([query, key, value], 2) if call.packed else query),
        "key": None if call.packed else _placed(key),
        "value": None if call.packed else _placed(value),
        "positions": _placed(inputs.positions),
        "starts": _placed(inputs.starts),
        "layer": layer,
        "output": aligned(*query.shape, dtype=inputs.query.dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_attention_is_called_as_the_driver_calls_it(name: str, dtype: str, kernels: Kernels) -> None:
    call, kind = CALLS[name], DTYPES[dtype][0]
    inputs = Inputs.random(call, kind)
    arguments = _attention(call, inputs)
    kernels.attention(**arguments)
    layer = arguments["layer"]
    found = Results(arguments["output"].view(inputs.query.shape), layer.keys, layer.values)
    assert found.same_bits(run(call, inputs, dtype))


def test_attention_takes_the_path_that_is_asked_for(kernels: Kernels) -> None:
    for call, path in (
        (CALLS["linear"], "split"),
        (CALLS["normalized"], "plain"),
        (Call(sequence=130, capacity=256), "tiled"),
    ):
        arguments = _attention(replace(call, positions=256), Inputs.random(replace(call, positions=256), torch.float16))
        assert kernels.attention_path(**arguments) == path
    call = replace(CALLS["linear"], path="tiled")
    inputs = Inputs.random(call, torch.float16)
    arguments = _attention(call, inputs)
    kernels.attention(**arguments, path="tiled")
    layer = arguments["layer"]
    found = Results(arguments["output"].view(inputs.query.shape), layer.keys, layer.values)
    assert found.same_bits(run(call, inputs, "float16"))


def _layer(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: {**given, "layer": replace(given["layer"], **changes)}


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("linear", lambda given: {**given, "key": None}, "key is a NoneType, which has no __dlpack__"),
        ("linear", _layer(sin=_draw(9, 32)), r"sin is float16 \[9, 32\], not float16 \[64, 32\]"),
        (
            "linear",
            _layer(values=_draw(2, 2, 17, 64)),
            r"values is float16 \[2, 2, 17, 64\], not float16 \[2, 2, 16, 64\]",
        ),
        ("linear", _layer(cache_type="int8"), "key_scales is a NoneType, which has no __dlpack__"),
        ("linear", _layer(query_norm=_draw(64)), "key_norm is a NoneType, which has no __dlpack__"),
        ("linear", _layer(heads=5), r"query is float16 \[2, 1, 256\], not float16 \[2, 1, 320\]"),
        ("int8", _layer(keys=_draw(1, 2, 16, 64)), r"keys is float16 \[1, 2, 16, 64\], not int8"),
        ("packed", _layer(page_table=_placed(np.zeros(4, np.int32))), "page_table has 1 dimensions, not 2"),
        (
            "linear",
            _layer(keys=_draw(3, 2, 16, 64), values=_draw(3, 2, 16, 64)),
            "the caches have 3 rows for a batch of 2",
        ),
        (
            "packed",
            _layer(keys=_draw(7, 2, 24, 64), values=_draw(7, 2, 24, 64)),
            "page_size is 24, no power of two within 16 and 4096",
        ),
        ("normalized", lambda given: {**given, "path": "tiled"}, r"the kernels \(tiled\) returned CUDA error 801"),
    ],
)
def test_attention_that_does_not_fit_is_named(
    name: str, change: Callable[[dict[str, Any]], dict[str, Any]], sentence: str, kernels: Kernels
) -> None:
    arguments = _attention(CALLS[name], Inputs.random(CALLS[name], torch.float16))
    with pytest.raises(KernelError, match=sentence):
        kernels.attention(**change(arguments))


@pytest.mark.parametrize(
    ("tokens", "path"), [(1, "eight"), (8, "eight"), (9, "sixteen"), (28, "sixteen"), (29, "wide"), (5000, "wide")]
)
def test_path_follows_the_table(tokens: int, path: str, kernels: Kernels) -> None:
    """Up to 8 tokens; then 16 pairs of each of 7 stored experts, of which a token has 4."""
    experts = _experts("float", torch.float16)
    hidden, logits, gates = _draw(tokens, HIDDEN), _draw(tokens, EXPERTS), _draw(tokens, 1)
    assert kernels.moe_path(hidden, logits, experts, _draw(tokens, HIDDEN), gates) == path


@pytest.mark.parametrize("weight_type", ["float", "int4", "fp8"])
@pytest.mark.parametrize("path", ["eight", "wide"])
def test_workspace_grows_with_tokens_up_to_a_chunk(path: str, weight_type: str) -> None:
    sizes = []

    def allocate(size: int) -> torch.Tensor:
        sizes.append(size)
        return aligned(size // 2 + 1).view(torch.int8)

    kernels, experts = emulated_kernels.kernels(allocate), _experts(weight_type, torch.float16)
    for tokens in (1, 8, 9, 500, 2047, 2048, 2049, 9000):
        hidden, logits, gates = aligned(tokens, HIDDEN), aligned(tokens, EXPERTS), aligned(tokens, 1)
        kernels.prepared_moe(hidden, logits, experts, aligned(tokens, HIDDEN), gates, path)
    # The last three are the same: the binding keeps a workspace of the size that it has.
    assert len(sizes) == 6 and sizes == sorted(sizes)


def test_weights_beyond_four_gibibytes_are_found(kernels: Kernels) -> None:
    """Of the last of 256 experts, the only one whose pages are ever touched."""
    experts, hidden, width = 256, 72, 65536
    gate_up = np.zeros((experts, 2 * width, hidden), np.float16)
    down = np.zeros((experts, hidden, width), np.float16)
    random = np.random.default_rng(0)
    gate_up[-1] = random.standard_normal((2 * width, hidden), np.float32) * hidden**-0.5
    down[-1] = random.standard_normal((hidden, width), np.float32) * width**-0.5
    x, logits, output = _draw(1, hidden), _placed(torch.zeros(1, experts).half()), _draw(1, hidden)
    logits[0, -1] = 60
    kernels.moe(x, logits, Experts(gate_up, down, experts, 1), output, path="eight")
    split = gate_up[-1].astype(np.float64).reshape(-1, 2, 8, hidden) @ x[0].double().numpy()
    gate, up = split[:, 0].ravel(), split[:, 1].ravel()
    expected = down[-1].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up)
    assert np.abs(output[0].double().numpy() - expected).max() < FLOAT16 * np.abs(expected).max()


@pytest.mark.parametrize("weight_type", ["float", "int8", "int4", "fp8"])
def test_address_that_is_missing_or_odd_is_refused(weight_type: str) -> None:
    """Of each tensor that the weights need, and of the workspace; nothing is computed."""
    kernels, experts = emulated_kernels.kernels(), _experts(weight_type, torch.float16)
    output = _placed(torch.full((TOKENS, HIDDEN), 7.0).half())
    call = kernels.prepared_moe(_draw(TOKENS, HIDDEN), _draw(TOKENS, EXPERTS), experts, output, _draw(TOKENS, 1))
    variables = inspect.getclosurevars(call).nonlocals
    addresses, space = variables["addresses"], variables["space"]
    present = [index for index, address in enumerate(addresses) if address]
    assert len(present) == {"float": 6, "int8": 8, "int4": 8, "fp8": 9}[weight_type]
    for index in present:
        right = addresses[index]
        for wrong in (None, right + 8):
            addresses[index] = wrong
            with pytest.raises(KernelError, match=r"returned CUDA error 1$"):
                call()
        addresses[index] = right
    for wrong in (0, space.address + 8):
        object.__setattr__(space, "address", wrong)
        with pytest.raises(KernelError, match=r"returned CUDA error 1$"):
            call()
    assert (output == 7).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"logits": _draw(TOKENS, EXPERTS + 1)}, r"logits is float16 \[6, 6\], not float16 \[6, 5\]"),
        ({"output": _draw(TOKENS, HIDDEN, dtype=torch.bfloat16)}, r"output is bfloat16 \[6, 64\], not float16"),
        ({"gates": None}, "gates is a NoneType, which has no __dlpack__"),
        ({"hidden": _draw(HIDDEN, TOKENS).T}, "hidden is not contiguous: call .contiguous"),
        ({"hidden": _draw(TOKENS, HIDDEN).double()}, "hidden is of a type that the kernels do not know"),
        ({"path": "grouped"}, r"the kernels \(grouped\) returned CUDA error 801"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], sentence: str, kernels: Kernels) -> None:
    arguments: dict[str, Any] = {
        "hidden": _draw(TOKENS, HIDDEN),
        "logits": _draw(TOKENS, EXPERTS),
        "experts": _experts("float", torch.float16),
        "output": _draw(TOKENS, HIDDEN),
        "gates": _draw(TOKENS, 1),
    }
    with pytest.raises(KernelError, match=sentence):
        kernels.moe(**{**arguments, **change})


def test_shape_that_the_kernels_refuse_is_named_by_them(kernels: Kernels) -> None:
    experts = replace(_experts("int4", torch.float16), group_size=32)
    groups = [
        _placed(np.zeros((EXPERTS + SHARED, size // 32, rows), np.float16)) for size, rows in ((64, 256), (128, 64))
    ]
    experts = replace(experts, gate_up_scales=groups[0], down_scales=groups[1])
    tokens = _draw(TOKENS, HIDDEN)
    with pytest.raises(KernelError, match="group_size is 32: INT4 weights have scales for 64 or 128 columns"):
        kernels.moe(tokens, _draw(TOKENS, EXPERTS), experts, _draw(TOKENS, HIDDEN), _draw(TOKENS, 1))


def test_tensors_are_read_where_they_are() -> None:
    values = torch.arange(24, dtype=torch.int32).view(2, 12)
    found = Tensor.of("values", values[1:])
    assert (found.address, found.shape, found.element) == (values[1:].data_ptr(), (1, 12), "int32")
    found = Tensor.of("values", np.zeros((3, 4), np.float32))
    assert (found.shape, found.element) == ((3, 4), "float32")
