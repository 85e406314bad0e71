"""The experts' kernels, run on the CPU by the emulator, against float64 PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qwenforge.plugins.moe.packing import ROW_GROUP, WeightType
from support import simt
from support.moe_kernel_case import DTYPES, Inputs, Shape, error, reference, run
from support.tolerances import BFLOAT16, FLOAT8, FLOAT16

pytestmark = pytest.mark.skipif(bool(simt.why_missing()), reason=simt.why_missing() or "-")

PATHS = {"table": 0, "eight": 1, "sixteen": 2, "wide": 3}
"""qwenforge::MoePath. The last one only in the emulator, where plain loops stand for the grouped GEMM; on a GPU,
test_grouped_gemm.py tests that by itself."""
TILED = ["eight", "sixteen", "wide"]
if not simt.ON_GPU:
    PATHS["grouped"] = 4
WEIGHTS = {
    "as the tokens": (WeightType.FLOAT, ROW_GROUP),
    "int8": (WeightType.INT8, ROW_GROUP),
    "int4, groups of 64": (WeightType.INT4, 64),
    "int4, groups of 128": (WeightType.INT4, 128),
    "fp8": (WeightType.FLOAT8, ROW_GROUP),
}
PACKED = list(WEIGHTS)[1:]

SHAPES = {
    "plain": Shape(),
    "one token": Shape(tokens=1),
    "17 tokens": Shape(tokens=17, normalize=True),
    "smallest sizes": Shape(hidden=8, width=8, experts=1, top_k=1),
    "odd sizes": Shape(tokens=7, hidden=72, width=24, experts=5, top_k=3),
    "wider than a tile": Shape(tokens=3, hidden=328, width=136, experts=3, top_k=2),
    "more pairs than a tile": Shape(tokens=40, hidden=16, width=16, experts=2, top_k=2, normalize=True),
    "one expert takes all": Shape(tokens=70, hidden=16, width=8, experts=1, top_k=1),
    "shared expert": Shape(tokens=9, shared=1),
    "four shared slices": Shape(tokens=6, hidden=40, width=40, experts=6, shared=4, top_k=2, normalize=True),
    "64 experts, top 8": Shape(tokens=11, hidden=32, width=16, experts=64, top_k=8, normalize=True),
    "60 experts, top 4, shared 4": Shape(tokens=4, hidden=32, width=16, experts=60, shared=4, top_k=4),
    "256 experts, top 8": Shape(tokens=3, hidden=16, width=8, experts=256, top_k=8),
    "256 experts, 64 shared, more pairs than one block sorts": Shape(
        tokens=9, hidden=16, width=8, experts=256, shared=64, top_k=8, normalize=True
    ),
    "33 experts": Shape(tokens=4, hidden=16, width=8, experts=33, top_k=8, normalize=True),
    "many tokens of one expert": Shape(tokens=150, hidden=40, width=24, experts=2, top_k=1),
    "more pairs than one block sorts": Shape(tokens=515, hidden=8, width=8, experts=3, top_k=1, shared=1),
}
PACKED_SHAPES = {
    "one token": Shape(tokens=1, width=64, experts=4),
    "a slice without columns": Shape(tokens=9, width=64, experts=3, top_k=2, shared=2, normalize=True),
    "rows behind the last block": Shape(tokens=20, hidden=192, width=320, experts=3, top_k=1, shared=1),
    "half a group of 128": Shape(tokens=5, hidden=576, width=192, experts=5, top_k=3),
    "more pairs than one block sorts": Shape(tokens=130, width=64, experts=2, top_k=2, shared=2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SHAPES)
def test_experts_agree_with_float64(name: str, path: str, dtype: str) -> None:
    shape = replace(SHAPES[name], path=PATHS[path])
    inputs = Inputs.random(shape, DTYPES[dtype][0], seed=len(name))
    assert error(run(shape, inputs, dtype), reference(shape, inputs)) < DTYPES[dtype][1]


@pytest.mark.parametrize("path", list(PATHS))
def test_tokens_behind_a_chunk_are_the_next_chunk(path: str) -> None:
    shape = Shape(tokens=2050, hidden=16, width=8, experts=3, top_k=1, shared=1, path=PATHS[path])
    inputs = Inputs.random(shape, torch.float16, seed=8)
    assert error(run(shape, inputs, "float16"), reference(shape, inputs)) < FLOAT16


@pytest.mark.parametrize("weights", PACKED)
def test_tokens_behind_a_chunk_are_the_next_chunk_with_packed_weights(weights: str) -> None:
    kind, group_size = WEIGHTS[weights]
    shape = Shape(tokens=2051, width=64, experts=2, top_k=1, weight_type=kind, group_size=group_size)
    inputs = Inputs.random(shape, torch.float16, seed=9)
    bound = FLOAT8 if kind is WeightType.FLOAT8 else FLOAT16
    assert error(run(shape, inputs, "float16"), reference(shape, inputs)) < bound


@pytest.mark.skipif(simt.ON_GPU, reason="the path needs CUTLASS on a GPU")
@pytest.mark.parametrize(("hidden", "width"), [(2056, 8), (8, 2056)])
def test_rows_longer_than_a_block_are_gathered_and_activated(hidden: int, width: int) -> None:
    shape = Shape(tokens=3, hidden=hidden, width=width, experts=2, top_k=1, path=PATHS["grouped"])
    inputs = Inputs.random(shape, torch.float16, seed=10)
    assert error(run(shape, inputs, "float16"), reference(shape, inputs)) < FLOAT16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", TILED)
@pytest.mark.parametrize("weights", PACKED)
@pytest.mark.parametrize("name", PACKED_SHAPES)
def test_packed_weights_agree_with_float64(name: str, weights: str, path: str, dtype: str) -> None:
    kind, group_size = WEIGHTS[weights]
    shape = replace(PACKED_SHAPES[name], path=PATHS[path], weight_type=kind, group_size=group_size)
    inputs = Inputs.random(shape, DTYPES[dtype][0], seed=len(name))
    # An activation on the edge between two E4M3 numbers may fall to either side.
    bound = FLOAT8 if kind is WeightType.FLOAT8 else DTYPES[dtype][1]
    assert error(run(shape, inputs, dtype), reference(shape, inputs)) < bound


@pytest.mark.parametrize("first_local", [0, 3])
@pytest.mark.parametrize(
    ("weights", "path"), [*((weights, "table") for weights in WEIGHTS), ("as the tokens", list(PATHS)[-1])]
)
def test_parts_of_the_experts_are_right_each(weights: str, path: str, first_local: int) -> None:
    """A part that no token goes to included."""
    kind, group_size = WEIGHTS[weights]
    whole = Shape(tokens=40, width=64, experts=16, top_k=3, normalize=True, weight_type=kind, group_size=group_size)
    whole = replace(whole, path=PATHS[path])
    inputs = Inputs.random(replace(whole, shared=2), torch.float16, seed=3)
    inputs.logits[:, 13:] = -30
    bound = FLOAT8 if kind is WeightType.FLOAT8 else FLOAT16
    largest = reference(replace(whole, shared=2), inputs).abs().max()
    for start, count, shared in ((first_local, 9, 2), (first_local + 9, 4 - first_local, 0), (13, 3, 0)):
        part = replace(whole, first_local=start, local=count, shared=shared)
        expected = reference(part, inputs)
        found = run(part, inputs, "float16")
        assert float((found.double() - expected).abs().max() / largest) < bound
    assert not found.any()


CHECKED = [
    *(("odd sizes", "as the tokens", path) for path in PATHS),
    *(("256 experts, top 8", "as the tokens", path) for path in PATHS),
    *(("rows behind the last block", weights, path) for weights in WEIGHTS for path in TILED),
    *(("half a group of 128", weights, path) for weights in WEIGHTS for path in TILED),
]


@pytest.mark.parametrize(("name", "weights", "path"), CHECKED)
def test_nothing_outside_the_tensors_is_touched(name: str, weights: str, path: str) -> None:
    kind, group_size = WEIGHTS[weights]
    shape = {**SHAPES, **PACKED_SHAPES}[name]
    shape = replace(shape, path=PATHS[path], weight_type=kind, group_size=group_size)
    inputs = Inputs.random(shape, torch.bfloat16, seed=1)
    bound = FLOAT8 if kind is WeightType.FLOAT8 else BFLOAT16
    assert error(run(shape, inputs, "bfloat16", checked=True), reference(shape, inputs)) < bound


@pytest.mark.parametrize("path", TILED)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["a slice without columns", "more pairs than one block sorts"])
def test_every_order_of_threads_gives_the_same_bits(name: str, weights: str, path: str) -> None:
    kind, group_size = WEIGHTS[weights]
    shape = replace(PACKED_SHAPES[name], path=PATHS[path], weight_type=kind, group_size=group_size)
    inputs = Inputs.random(shape, torch.float16, seed=2)
    # On a GPU the hardware orders them, twice.
    orders = (0, 1) if simt.ON_GPU else (0, 1, 2, 3)
    first, *others = (run(shape, inputs, "float16", schedule=number) for number in orders)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_token_is_no_work(weights: str) -> None:
    kind, group_size = WEIGHTS[weights]
    shape = Shape(tokens=0, width=64, weight_type=kind, group_size=group_size)
    assert run(shape, Inputs.random(shape, torch.float16), "float16").shape == (0, shape.hidden)


def test_experts_without_a_token_and_one_with_all_of_them() -> None:
    shape = Shape(tokens=37, experts=6, top_k=1)
    inputs = Inputs.random(shape, torch.float16, seed=3)
    inputs.logits[:] = 0
    inputs.logits[:, 4] = 20
    assert error(run(shape, inputs, "float16"), reference(shape, inputs)) < FLOAT16


def test_of_equal_logits_the_lower_ids_are_chosen() -> None:
    shape = Shape(tokens=3, experts=70, top_k=4)
    inputs = Inputs.random(shape, torch.bfloat16, seed=4)
    inputs.logits[0] = 0.5
    inputs.logits[1] = torch.tensor([0.0, 1.0] * 35)
    inputs.logits[2, 10:60] = 9
    assert error(run(shape, inputs, "bfloat16"), reference(shape, inputs)) < BFLOAT16


def test_the_larger_logit_is_chosen_where_probabilities_round_to_the_same() -> None:
    """In fp32, of logits next to 0 beside one of 0.5."""
    shape = Shape(tokens=1, experts=40, top_k=3, normalize=True)
    inputs = Inputs.random(shape, torch.bfloat16, seed=11)
    inputs.logits[0] = 2.0**-30 * torch.arange(40)
    inputs.logits[0, 7] = 0.5
    probabilities = torch.softmax(inputs.logits[0].float(), -1)
    assert probabilities[20] == probabilities[39] and inputs.logits[0, 20] < inputs.logits[0, 39]
    assert error(run(shape, inputs, "bfloat16"), reference(shape, inputs)) < BFLOAT16


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_number_of_experts_a_token(top_k: int) -> None:
    """All of them included."""
    shape = Shape(tokens=6, experts=8, top_k=top_k, shared=1, normalize=top_k % 2 == 0)
    inputs = Inputs.random(shape, torch.float16, seed=12)
    assert error(run(shape, inputs, "float16"), reference(shape, inputs)) < FLOAT16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["hidden", "logits", "gates"])
def test_nan_and_infinity_stay_in_their_token(where: str, value: float) -> None:
    """They come out of their own token, hang nothing, and no other token notices."""
    shape = Shape(tokens=6, experts=9, top_k=3, shared=1, normalize=True)
    inputs = Inputs.random(shape, torch.float16, seed=5)
    clean = run(shape, inputs, "float16")
    getattr(inputs, where)[2, 0] = value
    found = run(shape, inputs, "float16", checked=True)
    rows = torch.arange(shape.tokens) != 2
    assert torch.equal(found[rows], clean[rows])
    if value != value or where == "hidden":
        assert not torch.isfinite(found[2]).any()


def test_a_row_of_nan_logits_is_nan() -> None:
    shape = Shape(tokens=4, experts=33, top_k=8)
    inputs = Inputs.random(shape, torch.bfloat16, seed=6)
    inputs.logits[1] = float("nan")
    found = run(shape, inputs, "bfloat16", checked=True)
    assert torch.isnan(found[1]).all() and torch.isfinite(found[[0, 2, 3]]).all()


@pytest.mark.parametrize("path", ["eight", "wide"])
def test_an_expert_whose_logit_is_nan_is_chosen(path: str) -> None:
    """Where it alone is stored, it says so: NaN counts as larger than every number."""
    whole = Shape(tokens=3, experts=40, top_k=2, path=PATHS[path])
    inputs = Inputs.random(whole, torch.float16, seed=14)
    inputs.logits[:, 35] = torch.tensor([-9.0, float("nan"), -9.0])
    found = run(replace(whole, first_local=35, local=1), inputs, "float16")
    assert torch.isnan(found[1]).all() and not found[[0, 2]].any()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_lost_with_packed_weights(weights: str, value: float) -> None:
    kind, group_size = WEIGHTS[weights]
    shape = Shape(tokens=3, width=64, experts=3, weight_type=kind, group_size=group_size)
    inputs = Inputs.random(shape, torch.bfloat16, seed=7)
    inputs.hidden[1, 5] = value
    found = run(shape, inputs, "bfloat16")
    assert not torch.isfinite(found[1]).any() and torch.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_larger_than_fp8_is_cut_off(sign: int) -> None:
    """A token beyond 448 scales, and activated channels beyond theirs."""
    shape = Shape(tokens=4, width=64, experts=2, top_k=1, weight_type=WeightType.FLOAT8)
    inputs = Inputs.random(shape, torch.bfloat16, seed=13)
    inputs.hidden[1, 5] = 40 * sign
    inputs.hidden[2] *= 6 * sign
    assert error(run(shape, inputs, "bfloat16"), reference(shape, inputs)) < FLOAT8


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden": 12}, "hidden_size is 12, which has to be a multiple of 8"),
        ({"width": 4}, "intermediate_size is 4, which has to be a multiple of 8"),
        ({"width": 32, "weight_type": WeightType.INT8}, "intermediate_size is 32, which has to be a multiple of 64"),
        ({"hidden": 96, "width": 64, "weight_type": WeightType.FLOAT8}, "hidden_size is 96, .* a multiple of 64"),
        ({"experts": 257}, "num_experts is 257, not within 1 and 256"),
        ({"top_k": 9}, "top_k is 9, not within 1 and 8"),
        ({"top_k": 5, "experts": 4}, "top_k is 5, not within 1 and 8 or above num_experts, 4"),
        ({"shared": 65}, "num_shared_experts is 65, not within 0 and 64"),
        ({"first_local": 5, "local": 4}, "the 4 local experts from 5 on are not among the 8 experts"),
        ({"local": 0}, "the 0 local experts from 0 on"),
        ({"width": 64, "weight_type": WeightType.INT4, "group_size": 32}, "group_size is 32: INT4 weights"),
        ({"width": 64, "weight_type": WeightType.INT8, "group_size": 64}, "group_size is 64: INT8 and FP8 weights"),
    ],
    ids=str,
)
def test_size_that_is_not_supported_is_named_and_computes_nothing(change: dict[str, Any], sentence: str) -> None:
    shape = replace(Shape(tokens=2), **change)
    plenty = np.zeros(1 << 22, np.int8)
    with pytest.raises(simt.KernelError, match=rf"^exit code 1: {sentence}.*\n$"):
        simt.run("moe", "float16", shape.numbers, [plenty])


@pytest.mark.parametrize(("sm", "refused"), [(80, True), (86, True), (87, True), (89, False), (120, False)])
def test_fp8_is_refused_below_sm_89_with_the_alternatives(
    sm: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if simt.ON_GPU:
        pytest.skip("the compute capability is the GPU's")
    monkeypatch.setenv("SIMT_SM", str(sm))
    shape = Shape(tokens=2, width=64, weight_type=WeightType.FLOAT8)
    inputs = Inputs.random(shape, torch.float16)
    if not refused:
        assert torch.isfinite(run(shape, inputs, "float16")).all()
        return
    with pytest.raises(simt.KernelError, match=rf"SM 89 or newer, this one has SM {sm}: use INT8 or INT4 weights"):
        run(shape, inputs, "float16")


@pytest.mark.parametrize("normalize", [False, True])
def test_block_of_transformers_is_computed(normalize: bool) -> None:
    """Its own Qwen2MoeSparseMoeBlock in float64, shared expert and router included."""
    pytest.importorskip("transformers", reason="transformers is not installed, whose block this is compared with")
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    shape = Shape(tokens=12, hidden=64, width=24, experts=10, shared=2, top_k=4, normalize=normalize)
    config = Qwen2MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        shared_expert_intermediate_size=shape.shared * shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=normalize,
    )
    torch.manual_seed(7)
    block = Qwen2MoeSparseMoeBlock(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            # Representable in 16 bits, so that both sides have the very same weights.
            parameter.copy_((torch.randn_like(parameter) * parameter.shape[-1] ** -0.5).half().float())
        block = block.double()
        hidden = torch.randn(1, shape.tokens, shape.hidden).half()
        answer = block(hidden.double())
        expected = (answer[0] if isinstance(answer, tuple) else answer)[0]
        router = (hidden[0].double() @ block.gate.weight.T).half()
        gates = (hidden[0].double() @ block.shared_expert_gate.weight.T).half()
    routed = block.experts.gate_up_proj.half()
    shared = block.shared_expert
    gate = torch.cat([routed[:, : shape.width], shared.gate_proj.weight.half().view(shape.shared, shape.width, -1)])
    up = torch.cat([routed[:, shape.width :], shared.up_proj.weight.half().view(shape.shared, shape.width, -1)])
    columns = shared.down_proj.weight.half().view(shape.hidden, shape.shared, shape.width).transpose(0, 1)
    down = torch.cat([block.experts.down_proj.half(), columns])
    found = run(shape, Inputs(hidden[0], router, gate, up, down, gates), "float16")
    assert error(found, expected.detach()) < FLOAT16
