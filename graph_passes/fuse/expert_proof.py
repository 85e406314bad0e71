"""Prove what an unknown arrangement of experts computes by running it on a few tokens.

The nodes between the router's logits and the weighted sum are cut out and evaluated in fp32, whatever the graph's own
precision, on tokens that between them choose every expert. The result is compared with the intended sum over experts in
float64, for each way the two stacked weights could be laid out. Random tokens cannot show what happens far from them,
so that operators which bend at a threshold, such as a clamp of the activations, are refused before anything runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError
from qwenforge.exporter import weights
from qwenforge.exporter.checkpoint import CheckpointTensor
from qwenforge.graph_passes.execution import upcast_to_float32
from qwenforge.graph_passes.infra import consumers, static_dim, weight
from qwenforge.graph_passes.signature import detect_signature
from qwenforge.graph_passes.subgraph import ancestors, extract, leaves

LARGEST_WEIGHTS = 256 << 20
"""Bytes of expert weights that a proof reads; a larger unknown arrangement is left as it is."""
_BOUND = 1e-4
"""Largest accepted error relative to the result's scale: fp32 sums of some thousand products."""
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SMOOTH = frozenset(
    "Add Cast Concat Div Einsum Expand Gather GatherElements GatherND Gemm Identity MatMul Mul ReduceSum Reshape "
    "ScatterElements ScatterND Sigmoid Slice Softmax Split Squeeze Swish Tile TopK Transpose Unsqueeze".split()
)
"""Operators that may compute floating-point values between the router and the sum: they move values around, or do the
same to small and large ones. Integers (sorting and counting tokens) may be computed by any."""
_EVALUATOR_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What the reference implementation raises for a graph that it cannot run: it has no error class of its own."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One run of the cut-out part: tokens x [T, C], router logits [T, E] and its result [T, C]."""

    x: Array
    logits: Array
    result: Array


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
        GraphError: its weights are a checkpoint's or too large to run, it reads something else, or computes something
            else.
    """
    hidden, experts = static_dim(x, -1), static_dim(router_logits, -1)
    if hidden is None or experts is None:
        raise GraphError("the hidden size or the number of experts is not known")
    if x.dtype not in _TYPES:
        raise GraphError(f"experts in {x.dtype} are not supported")
    nodes = ancestors([output], stop=[*same_tokens, router_logits])
    _refuse_thresholds(nodes)
    stacked = _stacked_weights(nodes, experts)
    region = _Region(model, nodes, output, x, same_tokens, router_logits)
    samples = [region.run(logits, hidden) for logits in _choices(experts, top_k)]
    best = np.inf
    for gate_up, down, gate_up_name, down_name in _layouts(stacked, hidden):
        first, second = (np.asarray(tensor.numpy()).astype(np.float64) for tensor in (gate_up, down))
        error = max(_error(sample, first, second, top_k, normalize) for sample in samples)
        best = min(best, error)
        if error <= _BOUND:
            return gate_up, down, gate_up_name, down_name
    raise GraphError(
        "it looks like expert routing but computes something else: the closest reading is off by "
        f"{best:.1e} of the result's scale"
    )


def _refuse_thresholds(nodes: list[ir.Node]) -> None:
    for node in nodes:
        if node.domain:
            raise GraphError(f"the experts use {node.domain}::{node.op_type}, which only its own runtime knows")
        dtype = node.outputs[0].dtype
        if node.op_type not in _SMOOTH and (dtype is None or dtype.is_floating_point()) and node.op_type != "Constant":
            raise GraphError(f"the experts use {node.op_type}, which SwiGLU experts do not")


def _stacked_weights(nodes: list[ir.Node], experts: int) -> list[tuple[str, ir.TensorProtocol]]:
    found: dict[str, ir.TensorProtocol] = {}
    for node in nodes:
        for value in node.inputs:
            tensor = weight(value)
            if value is not None and tensor is not None and len(tensor.shape) == 3 and tensor.shape[0] == experts:
                found[str(value.name)] = tensor
    if len(found) != 2:
        raise GraphError(f"{len(found)} stacked expert weights lie behind the router where 2 are expected")
    if any(isinstance(leaf, CheckpointTensor) for tensor in found.values() for leaf in weights.leaves(tensor)):
        raise GraphError("the experts are arranged in an unknown way, and a checkpoint is not read to prove them")
    if sum(tensor.nbytes for tensor in found.values()) > LARGEST_WEIGHTS:
        raise GraphError("the experts are arranged in an unknown way and too large to prove by running them")
    return list(found.items())


@dataclass(frozen=True)
class _Region:
    """The part of ``model`` between the router's logits and the sum over experts."""

    model: ir.Model
    nodes: list[ir.Node]
    output: ir.Value
    x: ir.Value
    same_tokens: frozenset[ir.Value]
    router_logits: ir.Value

    def run(self, logits: npt.NDArray[np.float32], hidden: int) -> Sample:
        """The result for random tokens with these ``logits`` [T, E]."""
        count = len(logits)
        x = np.random.default_rng(count).standard_normal((count, hidden)).astype(np.float32)
        feeds: dict[ir.Value, npt.NDArray[np.generic]] = dict.fromkeys(self.same_tokens, x)
        feeds[self.router_logits] = logits
        for leaf in leaves(self.nodes, [self.output]):
            if leaf in feeds:
                continue
            if not self._has_token_count(leaf):
                raise GraphError(f"the experts also read {leaf.name}")
            feeds[leaf] = np.zeros((1, count), np.int64)
        result = self._evaluate(feeds)
        if result.shape != x.shape:
            raise GraphError("the sum over the experts has another shape than the tokens")
        return Sample(x.astype(np.float64), logits.astype(np.float64), result.astype(np.float64))

    def _has_token_count(self, leaf: ir.Value) -> bool:
        """Whether ``leaf`` is a graph input of one number a token, of which only the shape is read."""
        if not leaf.is_graph_input() or any(node.op_type != "Shape" for node in consumers(leaf) if node in self.nodes):
            return False
        signature = detect_signature(self.model)
        return leaf.name in (signature.input_ids, signature.position_ids)

    def _evaluate(self, feeds: dict[ir.Value, npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
        from onnx.reference import ReferenceEvaluator

        part = extract([self.output], list(feeds), self.model.graph.opset_imports[""])
        upcast_to_float32(part)
        for value in part.graph.initializers.values():
            assert value.const_value is not None
            # A weight may lie in a file, where the evaluator does not look.
            held = value.const_value
            value.const_value = ir.Tensor(np.asarray(held.numpy()), held.dtype, name=value.name)
        used = {value.name for value in part.graph.inputs}
        named = {str(value.name): array for value, array in feeds.items() if value.name in used}
        try:
            results = ReferenceEvaluator(ir.to_proto(part)).run(None, named)
        except _EVALUATOR_ERRORS as error:
            first_line = str(error).partition("\n")[0]
            raise GraphError(f"ONNX's reference implementation cannot run the experts: {first_line}") from error
        return np.asarray(next(iter(results)))


def _choices(experts: int, top_k: int) -> Iterator[npt.NDArray[np.float32]]:
    """Router logits [T, E] of tokens that choose every expert, of one token, and of a crowd that all choose alike."""
    generator = np.random.default_rng(experts)
    count = max(5, -(-experts // top_k))
    # Logits close to each other: each chosen expert counts for something.
    ranked = -np.sort(-0.5 * generator.standard_normal((count, experts)))
    order = generator.permutation(experts)
    covering = np.empty((count, experts))
    for token in range(count):
        covering[token, np.roll(order, -token * top_k)] = ranked[token]
    yield covering.astype(np.float32)
    yield (2 * generator.standard_normal((1, experts))).astype(np.float32)
    yield np.repeat(2 * generator.standard_normal((1, experts)), 19, 0).astype(np.float32)


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


def _error(sample: Sample, gate_up: Array, down: Array, top_k: int, normalize: bool) -> float:
    """Largest difference between the result and the intended sum, relative to the latter's scale."""
    expected = np.zeros_like(sample.x)
    exponentials = np.exp(sample.logits - sample.logits.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    for token, row in enumerate(probabilities):
        chosen = np.argsort(-row, kind="stable")[:top_k]
        scale = row[chosen] / row[chosen].sum() if normalize else row[chosen]
        for expert, share in zip(chosen, scale, strict=True):
            gate, up = np.split(gate_up[expert] @ sample.x[token], 2)
            expected[token] += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    error = np.abs(sample.result - expected).max() / max(np.abs(expected).max(), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")
