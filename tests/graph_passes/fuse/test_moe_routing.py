"""Expert routing as transformers computes it, in both of its arrangements; routings that mean something else stay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import names
from qwenforge.exporter.checkpoint import CheckpointTensor
from qwenforge.exporter.safetensors_header import StoredTensor
from qwenforge.graph_passes.fuse import expert_proof
from qwenforge.graph_passes.fuse.moe_routing import FuseMixtureOfExperts
from qwenforge.graph_passes.fuse.swiglu import FuseSwiGLU
from qwenforge.graph_passes.infra import RULE_TAG
from qwenforge.graph_passes.pipeline import prepare
from support.expert_graphs import ExpertCase
from support.small_graphs import Array, answers, apply_rule, graph_from_text, normal, ops, relative_error
from support.tolerances import FLOAT16, FLOAT32_REORDERED

EXPERTS, HIDDEN, WIDTH = 6, 16, 12
TYPES: dict[str, tuple[Any, int]] = {
    "float": (np.float32, 1),
    "float16": (np.float16, 10),
    "bfloat16": (ml_dtypes.bfloat16, 16),
}
SOFTMAX = "logits = MatMul(x, router)  p = Softmax<axis = -1>(logits)"
CHOICE = "top, ids = TopK<axis = -1, largest = 1, sorted = 1>(p, k)"
AS_CHOSEN = "weights = Identity(top)"
NORMALIZED = "total = ReduceSum<keepdims = 1>(top, last)  weights = Div(top, total)"
SILU = "s = Sigmoid(g)  a = Mul(g, s)"

GATHERED = f"""
    column = Unsqueeze(x, one)  copies = Expand(column, repeats)  tokens = Reshape(copies, rows)
    flat_weights = Reshape(weights, last)  flat_ids = Reshape(ids, last)  index = Unsqueeze(flat_ids, last)
    first = GatherND(gate_up, index)  token_columns = Unsqueeze(tokens, last)  b = MatMul(first, token_columns)
    h = Squeeze(b, last)  g, u = Split<axis = 1, num_outputs = 2>(h)  {SILU}  z = Mul(a, u)
    second = GatherND(down, index)  z_columns = Unsqueeze(z, last)  d = MatMul(second, z_columns)  o = Squeeze(d, last)
    scale = Unsqueeze(flat_weights, last)  w = Mul(o, scale)
    by_token = Reshape(w, chosen_rows)  y = ReduceSum<keepdims = 0>(by_token, one)
"""
"""transformers' ``batched_mm``: each token beside copies of its experts' matrices."""


def _by_expert(source: str, weights: str, target: str) -> str:
    """Each expert's rows of ``source`` times its own matrix, joined again."""
    nodes = [f"{', '.join(f'{weights}_{e}' for e in range(EXPERTS))} = Split<axis=0, num_outputs={EXPERTS}>({weights})"]
    for e in range(EXPERTS):
        low = f"end_{e - 1}" if e else "nought"
        nodes.append(f"{target}_r{e} = Range({low}, end_{e}, unit)  {target}_x{e} = Gather({source}, {target}_r{e})")
        nodes.append(
            f"{target}_w{e} = Squeeze({weights}_{e}, zero)  {target}_y{e} = MatMul({target}_x{e}, {target}_w{e})"
        )
    joined = ", ".join(f"{target}_y{e}" for e in range(EXPERTS))
    return "\n".join([*nodes, f"{target} = Concat<axis = 0>({joined})"])


ENDS = "\n".join(f"end_{e} = Squeeze(bound_{e}, zero)" for e in range(EXPERTS))
SORTED = f"""
    flat_weights = Reshape(weights, last)  flat_ids = Reshape(ids, last)  pairs = Shape(flat_ids)
    sorted_ids, order = TopK<axis = -1, largest = 0, sorted = 1>(flat_ids, pairs)
    token = Div(order, k)  token_index = Unsqueeze(token, last)  order_index = Unsqueeze(order, last)
    rows_of_experts = GatherND(x, token_index)  sorted_weights = GatherND(flat_weights, order_index)
    clamped = Clip(sorted_ids, nought, largest)  ones = Expand(unit, pairs)
    counts = ScatterElements<axis = 0, reduction = "add">(zeros, clamped, ones)  bounds = CumSum(counts, nought)
    {", ".join(f"bound_{e}" for e in range(EXPERTS))} = Split<axis = 0, num_outputs = {EXPERTS}>(bounds)
    {ENDS}
    {_by_expert("rows_of_experts", "gate_up", "h")}
    g, u = Split<axis = 1, num_outputs = 2>(h)  {SILU}  z = Mul(a, u)
    {_by_expert("z", "down", "o")}
    scale = Unsqueeze(sorted_weights, last)  w = Mul(o, scale)
    unused, inverse = TopK<axis = -1, largest = 0, sorted = 1>(order, pairs)  inverse_index = Unsqueeze(inverse, last)
    restored = GatherND(w, inverse_index)
    by_token = Reshape(restored, chosen_rows)  y = ReduceSum<keepdims = 0>(by_token, one)
"""
"""transformers' ``grouped_mm`` as OnnxExporter writes it: pairs of token and expert sorted by expert."""
FORMS = {"gathered": GATHERED, "sorted": SORTED}


def _constants(top_k: int) -> dict[str, Array]:
    given = {
        "k": [top_k],
        "last": [-1],
        "one": [1],
        "zero": [0],
        "repeats": [1, top_k, 1],
        "rows": [-1, HIDDEN],
        "chosen_rows": [-1, top_k, HIDDEN],
        "zeros": [0] * EXPERTS,
        "nought": 0,
        "unit": 1,
        "largest": EXPERTS - 1,
        "reverse": list(range(top_k))[::-1],
        "experts": EXPERTS,
    }
    return {name: np.asarray(value, np.int64) for name, value in given.items()}


def _weights(form: str, dtype: Any) -> dict[str, Array]:
    gate_up = normal(EXPERTS, 2 * WIDTH, HIDDEN, scale=0.3).astype(dtype)
    down = normal(EXPERTS, HIDDEN, WIDTH, scale=0.3).astype(dtype)
    if form == "sorted":
        gate_up, down = (np.ascontiguousarray(w.transpose(0, 2, 1)) for w in (gate_up, down))
    return {"router": normal(HIDDEN, EXPERTS).astype(dtype), "gate_up": gate_up, "down": down}


def _model(
    nodes: str, form: str = "gathered", kind: str = "float", top_k: int = 3, outputs: str = "", **given: Array
) -> ir.Model:
    values = _constants(top_k) | _weights(form, TYPES[kind][0]) | given
    used = {name: array for name, array in values.items() if re.search(rf"[(,] ?{name}[,)]", nodes)}
    text = f"({kind}[T,{HIDDEN}] x) => ({kind}[T,{HIDDEN}] y{outputs}) {{ {nodes} }}"
    return prepare(graph_from_text(text, **used))


def _expected(x: Array, top_k: int, normalize: bool) -> Array:
    weights = {name: array.astype(np.float64) for name, array in _weights("gathered", x.dtype).items()}
    logits = x.astype(np.float64) @ weights["router"]
    return ExpertCase(x, logits, weights["gate_up"], weights["down"], top_k, normalize).expected()


def _stacked(model: ir.Model) -> list[Array]:
    (node,) = [node for node in model.graph if node.op_type == "MixtureOfExperts"]
    tensors = [value.const_value for value in node.inputs[2:] if value is not None]
    return [np.asarray(tensor.numpy()) for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
@pytest.mark.parametrize("form", FORMS)
def test_both_arrangements_become_one_node(form: str, top_k: int, normalize: bool) -> None:
    nodes = f"{SOFTMAX} {CHOICE} {NORMALIZED if normalize else AS_CHOSEN} {FORMS[form]}"
    model = _model(nodes, form, top_k=top_k)
    rule = apply_rule(FuseMixtureOfExperts(), model)
    assert rule.matches == 1 and rule.failures == [] and ops(model) == ["MatMul", "MixtureOfExperts"]
    projection, node = model.graph
    assert node.domain == names.DOMAIN and node.metadata_props[RULE_TAG] == "moe_routing"
    assert list(node.inputs[:2]) == [model.graph.inputs[0], projection.outputs[0]]
    assert node.attributes["top_k"].as_int() == top_k and node.attributes["normalize_topk"].as_int() == int(normalize)
    for found, wanted in zip(_stacked(model), list(_weights("gathered", np.float32).values())[1:], strict=True):
        assert np.array_equal(found, wanted)
    for tokens in (1, 7):
        x = normal(tokens, HIDDEN)
        assert relative_error(answers(model, x=x)[0], _expected(x, top_k, normalize)) <= FLOAT32_REORDERED


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_casts_of_half_precision_are_part_of_it(form: str, normalize: bool, kind: str) -> None:
    """Weights are chosen in fp32 and cast back; the sum is made in fp32 and cast back."""
    code = TYPES[kind][1]
    choice = CHOICE.replace("(p, k)", "(wide, k)")
    combine = NORMALIZED.replace("weights =", "v =") if normalize else "v = Identity(top)"
    nodes = f"{SOFTMAX}  wide = Cast<to = 1>(p)  {choice}  {combine}  weights = Cast<to = {code}>(v)  {FORMS[form]}"
    nodes = nodes.replace("y = ReduceSum<keepdims = 0>(by_token, one)", "")
    nodes += f"f = Cast<to = 1>(by_token)  t = ReduceSum<keepdims = 0>(f, one)  y = Cast<to = {code}>(t)"
    model = _model(nodes, form, kind)
    rule = apply_rule(FuseMixtureOfExperts(), model)
    assert rule.matches == 1 and rule.failures == [] and ops(model) == ["MatMul", "MixtureOfExperts"]
    assert model.graph.node(1).attributes["normalize_topk"].as_int() == int(normalize)
    if kind == "float16":
        x = normal(5, HIDDEN, dtype=np.float16)
        assert relative_error(answers(model, x=x)[0], _expected(x, 3, normalize)) <= 2 * FLOAT16


def test_softmax_in_fp32_of_half_precision_logits_is_matched() -> None:
    softmax = "logits = MatMul(x, router)  wide = Cast<to = 1>(logits)  p = Softmax<axis = -1>(wide)"
    nodes = f"{softmax} {CHOICE}  weights = Cast<to = 10>(top)  {GATHERED}"
    assert apply_rule(FuseMixtureOfExperts(), _model(nodes, kind="float16")).matches == 1


def test_gather_by_plain_ids_is_matched_by_structure() -> None:
    nodes = f"{SOFTMAX} {CHOICE} {AS_CHOSEN} {GATHERED}".replace(
        "GatherND(gate_up, index)", "Gather(gate_up, flat_ids)"
    )
    model = _model(nodes.replace("GatherND(down, index)", "Gather(down, flat_ids)"))
    for name in ("gate_up", "down"):
        _make_checkpoint_tensor(model, name)
    assert apply_rule(FuseMixtureOfExperts(), model).matches == 1


def test_weights_in_a_data_file_are_read_for_the_proof(tmp_path: Path) -> None:
    ir.save(_model(f"{SOFTMAX} {CHOICE} {AS_CHOSEN} {SORTED}", "sorted"), tmp_path / "m.onnx", external_data="m.data")
    model = ir.load(tmp_path / "m.onnx")
    assert isinstance(model.graph.initializers["gate_up"].const_value, ir.ExternalTensor)
    rule = apply_rule(FuseMixtureOfExperts(), model)
    assert rule.matches == 1 and rule.failures == []


def _make_checkpoint_tensor(model: ir.Model, name: str) -> None:
    """Let the weight be one of a checkpoint that is not there."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    shape = tuple(value.const_value.shape.numpy())
    stored = StoredTensor(name=name, dtype="F32", shape=shape, offset=0, length=value.const_value.nbytes)
    value.const_value = CheckpointTensor(stored, Path("/nowhere/model.safetensors"))


def test_checkpoint_is_never_read() -> None:
    for form, matches in (("gathered", 1), ("sorted", 0)):
        model = _model(f"{SOFTMAX} {CHOICE} {AS_CHOSEN} {FORMS[form]}", form)
        for name in ("gate_up", "down"):
            _make_checkpoint_tensor(model, name)
        rule = apply_rule(FuseMixtureOfExperts(), model)
        assert rule.matches == matches
        assert matches or "a checkpoint is not read to prove them" in rule.failures[0]


def test_large_weights_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_proof, "LARGEST_WEIGHTS", 1000)
    rule = apply_rule(FuseMixtureOfExperts(), _model(f"{SOFTMAX} {CHOICE} {AS_CHOSEN} {SORTED}", "sorted"))
    assert rule.matches == 0 and "too large to prove by running them" in rule.failures[0]


def test_shared_expert_stays_recognizable_beside_it() -> None:
    shared = """
        sg = MatMul(x, shared_gate)  ss = Sigmoid(sg)  sa = Mul(sg, ss)  su = MatMul(x, shared_up)  sz = Mul(sa, su)
        sd = MatMul(sz, shared_down)  e = MatMul(x, gate)  f = Sigmoid(e)  part = Mul(f, sd)  y = Add(routed, part)
    """
    nodes = f"{SOFTMAX} {CHOICE} {AS_CHOSEN} {GATHERED}".replace("y = ReduceSum", "routed = ReduceSum") + shared
    weights = {"shared_gate": normal(HIDDEN, 8), "shared_up": normal(HIDDEN, 8, seed=1), "gate": normal(HIDDEN, 1)}
    model = _model(nodes, **weights, shared_down=normal(8, HIDDEN))
    x = normal(5, HIDDEN)
    expected = answers(model, x=x)[0]
    for rule in (FuseMixtureOfExperts(), FuseSwiGLU()):
        apply_rule(rule, model)
        assert rule.matches == 1 and rule.failures == []
    found = [
        "MatMul",
        "MixtureOfExperts",
        "MatMul",
        "Split",
        "Swish",
        "Mul",
        "MatMul",
        "MatMul",
        "Sigmoid",
        "Mul",
        "Add",
    ]
    assert sorted(ops(model)) == sorted(found)
    assert relative_error(answers(model, x=x)[0], expected) <= FLOAT32_REORDERED


ROUTING = f"{SOFTMAX} {CHOICE} {AS_CHOSEN}"
ELSE = "it looks like expert routing but computes something else: the closest reading is off by"
SWIGLU_EXPERTS = "which SwiGLU experts do not"
ROUTINGS: dict[str, tuple[str, str]] = {
    "weights scaled": (f"{SOFTMAX} {CHOICE}  weights = Mul(top, factor)", ELSE),
    "weights scaled after their division": (
        f"{SOFTMAX} {CHOICE}  {NORMALIZED.replace('weights =', 'v =')}  weights = Mul(v, factor)",
        ELSE,
    ),
    "weights in another order": (f"{SOFTMAX} {CHOICE}  weights = Gather<axis = 1>(top, reverse)", ELSE),
    "other experts than chosen": (
        f"{SOFTMAX} {CHOICE.replace('ids =', 'c =')}  m = Add(c, unit)  ids = Mod(m, experts)  {AS_CHOSEN}",
        ELSE,
    ),
    "softmax of the chosen": (
        f"logits = MatMul(x, router) {CHOICE.replace('(p, k)', '(logits, k)')}  weights = Softmax<axis = -1>(top)",
        "the experts are not chosen by a softmax of the router's logits",
    ),
    "a sigmoid router": (
        f"{SOFTMAX.replace('Softmax<axis = -1>', 'Sigmoid')} {CHOICE} {NORMALIZED}",
        "the experts are not chosen by a softmax of the router's logits",
    ),
    "the least probable": (
        f"{SOFTMAX} {CHOICE.replace('largest = 1', 'largest = 0')} {AS_CHOSEN}",
        "the least probable experts are chosen",
    ),
    "experts limited to a group": (
        f"{SOFTMAX}  q = Mul(p, group)  {CHOICE.replace('(p, k)', '(q, k)')} {AS_CHOSEN}",
        "the experts are not chosen by a softmax of the router's logits",
    ),
    "softmax over tokens": (
        f"{SOFTMAX.replace('axis = -1', 'axis = 0')} {CHOICE} {AS_CHOSEN}",
        "the router's softmax is not over the experts",
    ),
    "something added to the sum": (
        f"{SOFTMAX} {CHOICE}  t = ReduceSum<keepdims = 1>(top, last)  e = Add(t, factor)  weights = Div(top, e)",
        "a constant is added to the sum of the weights",
    ),
    "divided by the largest": (
        f"{SOFTMAX} {CHOICE}  t = ReduceMax<keepdims = 1>(top, last)  weights = Div(top, t)",
        "the chosen weights are divided by something other than their sum",
    ),
    "divided by the sum over tokens": (
        f"{SOFTMAX} {CHOICE}  t = ReduceSum<keepdims = 1>(top, zero)  weights = Div(top, t)",
        "the chosen weights are summed over another axis than the experts",
    ),
    "a bias on the logits": (
        f"l = MatMul(x, router)  logits = Add(l, bias)  p = Softmax<axis = -1>(logits)  {CHOICE} {AS_CHOSEN}",
        "the router's logits are not a projection",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ROUTINGS)
def test_routing_that_means_something_else_stays_and_is_told(case: str, form: str) -> None:
    routing, reason = ROUTINGS[case]
    given = {
        "factor": np.array(2.5, np.float32),
        "group": np.array([1, 1, 1, 0, 0, 0], np.float32),
        "bias": normal(EXPERTS),
    }
    model = _model(f"{routing} {FORMS[form]}", form, **given)
    before = ops(model)
    rule = apply_rule(FuseMixtureOfExperts(), model)
    assert rule.matches == 0 and ops(model) == before
    assert len(rule.failures) == 1 and rule.failures[0].startswith(reason)


EXPERT_CHANGES: dict[str, tuple[str, str, str]] = {
    "gelu": (SILU, "a = Gelu(g)", f"the experts use Gelu, {SWIGLU_EXPERTS}"),
    "a clamped gate": (
        SILU,
        f"c = Clip(g, low, high)  {SILU.replace('(g', '(c')}",
        f"the experts use Clip, {SWIGLU_EXPERTS}",
    ),
    "the halves exchanged": ("g, u = Split", "u, g = Split", ELSE),
    "a steeper sigmoid": (SILU, "t = Mul(g, factor)  s = Sigmoid(t)  a = Mul(g, s)", ELSE),
    "one more than up": ("z = Mul(a, u)", "v = Add(u, factor)  z = Mul(a, v)", ELSE),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", EXPERT_CHANGES)
def test_experts_that_compute_something_else_stay_and_are_told(case: str, form: str) -> None:
    old, new, reason = EXPERT_CHANGES[case]
    numbers = {"low": -7.0, "high": 7.0, "factor": 1.702}
    given = {name: np.array(number, np.float32) for name, number in numbers.items()}
    model = _model(f"{ROUTING} {FORMS[form].replace(old, new)}", form, **given)
    before = ops(model)
    rule = apply_rule(FuseMixtureOfExperts(), model)
    assert rule.matches == 0 and ops(model) == before
    assert len(rule.failures) == 1 and rule.failures[0].startswith(reason)


@pytest.mark.parametrize(
    ("repeated", "reason"),
    [
        ("column = Unsqueeze(x, zero)  copies = Expand(column, whole)", ELSE),
        ("moved = Add(x, factor)  column = Unsqueeze(moved, one)  copies = Expand(column, repeats)", ELSE),
        (
            "seen = Max(x, factor)  column = Unsqueeze(seen, one)  copies = Expand(column, repeats)",
            "the experts use Max",
        ),
    ],
    ids=["in the order of other rows", "moved", "cut off"],
)
def test_experts_of_other_tokens_than_the_router_reads_are_told(repeated: str, reason: str) -> None:
    plain = "column = Unsqueeze(x, one)  copies = Expand(column, repeats)"
    extra = {"factor": np.array(0.5, np.float32), "whole": np.array([3, 1, 1])}
    model = _model(f"{ROUTING} {GATHERED.replace(plain, repeated)}", **extra)
    before = ops(model)
    rule = apply_rule(FuseMixtureOfExperts(), model)
    assert rule.matches == 0 and ops(model) == before
    assert len(rule.failures) == 1 and rule.failures[0].startswith(reason)


def test_experts_of_another_runtime_are_told() -> None:
    nodes = GATHERED.replace(SILU, "a = com.microsoft.QuickGelu<alpha = 1.0>(g)")
    rule = apply_rule(FuseMixtureOfExperts(), _model(f"{ROUTING} {nodes}"))
    assert rule.matches == 0
    assert rule.failures[0].startswith("the experts use com.microsoft::QuickGelu, which only its own runtime knows")


ROOM = f"""
    {SOFTMAX} {CHOICE}  hot = OneHot(ids, depth, on_off)  filled = CumSum(hot, nought)  fits = LessOrEqual(filled, room)
    open = Cast<to = 1>(fits)  ids_column = Unsqueeze(ids, last)  mine = GatherElements<axis = 2>(open, ids_column)
    flags = Squeeze(mine, two)  weights = Mul(top, flags)
"""
"""Each expert has room for a number of tokens; those that come later are dropped."""


def test_experts_with_room_for_a_few_tokens_are_told() -> None:
    """Five tokens would not fill them, were they not sent to the same ones."""
    extra = {"depth": np.array(EXPERTS), "on_off": np.array([0, 1]), "room": np.array(8), "two": np.array([2])}
    rule = apply_rule(FuseMixtureOfExperts(), _model(f"{ROOM} {GATHERED}", **extra))
    assert rule.matches == 0 and rule.failures[0].startswith(ELSE)


def test_experts_that_the_proof_cannot_run_are_told() -> None:
    """The reference implementation wants OneHot's depth as a scalar, though the standard allows [1]."""
    extra = {"depth": np.array([EXPERTS]), "on_off": np.array([0, 1]), "room": np.array(8), "two": np.array([2])}
    rule = apply_rule(FuseMixtureOfExperts(), _model(f"{ROOM} {GATHERED}", **extra))
    assert rule.matches == 0
    assert rule.failures[0].startswith("ONNX's reference implementation cannot run the experts")


def test_router_logits_read_elsewhere_are_told() -> None:
    model = _model(f"{ROUTING} {GATHERED}  seen = Relu(logits)", outputs=f", float[T,{EXPERTS}] seen")
    rule = apply_rule(FuseMixtureOfExperts(), model)
    assert rule.matches == 0 and rule.failures[0].startswith("the router's logits have another use")


def test_top_k_of_something_else_is_told() -> None:
    """Sampling of tokens, for one."""
    model = graph_from_text("(float[T,8] x) => (float[T,2] y) { y, i = TopK(x, k) }", k=np.array([2]))
    rule = apply_rule(FuseMixtureOfExperts(), model)
    assert rule.matches == 0 and rule.failures[0].startswith("the experts are not chosen by a softmax")
