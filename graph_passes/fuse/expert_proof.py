"""Prove what an unknown arrangement of experts computes by running it on a few tokens.

The nodes between the router's logits and the weighted sum are cut out and evaluated; the result is compared with the
intended sum over experts in float64, for each way the two stacked weights could be laid out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.exporter import weights
from qwenforge.graph_passes.infra import static_dim
from qwenforge.graph_passes.signature import detect_signature
from qwenforge.graph_passes.subgraph import ancestors, evaluate, leaves

LARGEST_WEIGHTS = 256 << 20
"""Bytes of expert weights that a proof reads; a larger unknown arrangement is left as it is."""
_BOUND = {ir.DataType.FLOAT: 1e-4, ir.DataType.FLOAT16: 2e-2, ir.DataType.BFLOAT16: 1e-1}
"""Largest accepted error relative to the result's scale: sums of a few hundred products in the graph's own precision."""

Array = npt.NDArray[np.float64]


def prove_experts(
    model: ir.Model,
    *,
    x: ir.Value,
    same_tokens: frozenset[ir.Value],
    router_logits: ir.Value,
    output: ir.Value,
    top_k: int,
    normalize: bool,
) -> tuple[ir.TensorProtocol, ir.TensorProtocol, str, str]:
    """(gate_up [E, 2I, C], down [E, C, I], names of their sources) of the arrangement that leads to ``output``.

    Raises:
        GraphError: it is too large to run, reads something else, or computes something else.
    """
    hidden, experts = static_dim(x, -1), static_dim(router_logits, -1)
    if hidden is None or experts is None:
        raise GraphError("the hidden size or the number of experts is not known")
    stop = [*same_tokens, router_logits]
    nodes = ancestors([output], stop=stop)
    stacked = _stacked_weights(nodes, experts)
    if sum(tensor.nbytes for _, tensor in stacked) > LARGEST_WEIGHTS:
        raise GraphError("the experts are arranged in an unknown way and too large to prove by running them")
    samples = [
        _sample(model, nodes, output, list(same_tokens), router_logits, tokens, hidden, experts) for tokens in (5, 1)
    ]
    best = np.inf
    bound = _BOUND.get(x.dtype or ir.DataType.UNDEFINED)
    if bound is None:
        raise GraphError(f"experts in {x.dtype} are not supported")
    for gate_up, down, gate_up_name, down_name in _layouts(stacked, hidden):
        first, second = (np.asarray(tensor.numpy()).astype(np.float64) for tensor in (gate_up, down))
        error = max(_error(sample, first, second, top_k, normalize) for sample in samples)
        best = min(best, error)
        if error <= bound:
            return gate_up, down, gate_up_name, down_name
    raise GraphError(
        "it looks like expert routing but computes something else: the closest reading is off by "
        f"{best:.1e} of the result's scale"
    )


def _stacked_weights(nodes: list[ir.Node], experts: int) -> list[tuple[str, ir.TensorProtocol]]:
    found: dict[str, ir.TensorProtocol] = {}
    for node in nodes:
        for value in node.inputs:
            tensor = value.const_value if value is not None else None
            if value is not None and tensor is not None and len(tensor.shape) == 3 and tensor.shape[0] == experts:
                found[str(value.name)] = tensor
    if len(found) != 2:
        raise GraphError(f"{len(found)} stacked expert weights lie behind the router where 2 are expected")
    return list(found.items())


def _sample(
    model: ir.Model,
    nodes: list[ir.Node],
    output: ir.Value,
    tokens: list[ir.Value],
    router_logits: ir.Value,
    count: int,
    hidden: int,
    experts: int,
) -> tuple[Array, Array, Array]:
    """(x, logits, result) of one run with ``count`` random tokens."""
    generator = np.random.default_rng(count)
    dtype = router_logits.dtype or ir.DataType.FLOAT
    x = generator.standard_normal((count, hidden)).astype(dtype.numpy())
    logits = (2 * generator.standard_normal((count, experts))).astype(dtype.numpy())
    feeds: dict[ir.Value, npt.NDArray[np.generic]] = {value: x for value in tokens}
    feeds[router_logits] = logits
    signature = detect_signature(model)
    for leaf in leaves(nodes, [output]):
        if leaf in feeds:
            continue
        if leaf.name != signature.input_ids:
            raise GraphError(f"the experts also read {leaf.name}")
        feeds[leaf] = np.zeros((1, count), np.int64)
    result = evaluate([output], feeds, model.graph.opset_imports[""])[0]
    if result.shape != x.shape:
        raise GraphError("the sum over the experts has another shape than the tokens")
    return x.astype(np.float64), logits.astype(np.float64), result.astype(np.float64)


def _layouts(
    stacked: list[tuple[str, ir.TensorProtocol]], hidden: int
) -> Iterator[tuple[ir.TensorProtocol, ir.TensorProtocol, str, str]]:
    """Every reading of the two weights as gate_up [E, 2I, C] and down [E, C, I], plain or transposed."""
    for (gate_name, gate), (down_name, down) in (stacked, stacked[::-1]):
        for flip_gate, flip_down in itertools.product((False, True), repeat=2):
            first = weights.transpose(gate, [0, 2, 1]) if flip_gate else gate
            second = weights.transpose(down, [0, 2, 1]) if flip_down else down
            inner = second.shape[2]
            if first.shape[2] == hidden == second.shape[1] and first.shape[1] == 2 * int(inner):  # type: ignore[arg-type]
                yield first, second, gate_name, down_name


def _error(sample: tuple[Array, Array, Array], gate_up: Array, down: Array, top_k: int, normalize: bool) -> float:
    x, logits, result = sample
    expected = np.zeros_like(x)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    for token, row in enumerate(probabilities):
        chosen = np.argsort(-row, kind="stable")[:top_k]
        scale = row[chosen] / row[chosen].sum() if normalize else row[chosen]
        for expert, weight in zip(chosen, scale, strict=True):
            gate, up = np.split(gate_up[expert] @ x[token], 2)
            expected[token] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    error = np.abs(result - expected).max() / max(np.abs(expected).max(), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")
