"""A portable graph cut into pieces that are calibrated one after the other, each with one layer's sites in it.

Where :func:`~qwenforge.graph_passes.segments.split_by_layer` goes by the names that our own exporter gives, this goes
by structure, so that anybody's graph can be cut: a node belongs to the last layer among the sites that it depends on.
Piece 0 precedes the layers; what depends on the vocabulary projection, and what makes its input, is the last piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.errors import GraphError, UserError
from qwenforge.exporter import weights
from qwenforge.exporter.external_data import save_model
from qwenforge.exporter.leaves import mapped_array, read_blocks
from qwenforge.exporter.weights import leaves
from qwenforge.graph_passes.execution import upcast_to_float32
from qwenforge.graph_passes.quantize.sites import CacheSite, ExpertSite, LinearSite, Sites
from qwenforge.graph_passes.segments import split_by_owner

Array = npt.NDArray[Any]

_HALF_TYPES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_FLOAT_TYPES = (ir.DataType.FLOAT, *_HALF_TYPES)
_CHECKED_BYTES = 1 << 24


def split_by_site(model: ir.Model, sites: Sites) -> list[ir.Model]:
    """The pieces in execution order.

    Raises:
        GraphError: the graph has no attention of the portable form, so that there is nothing to calibrate.
    """
    if not sites.caches:
        raise GraphError("the graph has no qwenforge::GroupedQueryAttention: bring it to the portable form first.")
    own: dict[ir.Node, int] = {}
    order = {layer: index + 1 for index, layer in enumerate(site.layer for site in sites.caches.values())}
    found: list[LinearSite | ExpertSite | CacheSite] = [*sites.linear.values(), *sites.experts.values()]
    found += sites.caches.values()
    for site in found:
        own[site.node] = len(order) + 1 if site.layer is None else order[site.layer]
    owner: dict[ir.Node, int] = {}
    for node in model.graph:
        before = [owner[producer] for value in node.inputs if value is not None and (producer := value.producer())]
        owner[node] = max([own.get(node, 0), *before])
    return split_by_owner(model, _tail_together(model, owner, len(order)))


def _tail_together(model: ir.Model, owner: dict[ir.Node, int], last: int) -> dict[ir.Node, int]:
    """What only leads to the logits goes with them: the final norm, and the choice of tokens, which other pieces run
    before it is known."""
    head = {node for node in owner if owner[node] > last}
    for node in reversed(list(model.graph)):
        readers = [reader for value in node.outputs for reader, _ in value.uses()]
        movable = owner[node] == 0 or (owner[node] == last and _is_tail(node))
        leaves_graph = any(value.is_graph_output() for value in node.outputs)
        if movable and readers and not leaves_graph and all(reader in head for reader in readers):
            head.add(node)
    return {node: last + 1 if node in head else number for node, number in owner.items()}


def _is_tail(node: ir.Node) -> bool:
    return node.op_type in ("GatherND", "Gather", "Unsqueeze", "RMSNormalization", "Cast", "Reshape")


class RunnablePiece:
    """One piece saved with its weights, in fp32, to be run in ONNX Runtime.

    16-bit weights are widened, because ONNX Runtime has no bfloat16 kernels for the CPU; the range of an activation is
    the same but for its rounding.

    Args:
        piece: from :func:`split_by_site`; it is not changed.
        extra_outputs: names of values inside the piece that are wanted too.
        folder: where the piece is saved; :meth:`close` removes it.
        threads: of ONNX Runtime.
        providers: ONNX Runtime's, in order of preference.

    Attributes:
        inputs, outputs: names of values.

    Raises:
        UserError: a weight is not finite; the message names the tensor.
    """

    def __init__(
        self, piece: ir.Model, extra_outputs: Sequence[str], folder: Path, *, threads: int, providers: Sequence[str]
    ) -> None:
        self._path = folder / "piece.onnx"
        saved = _in_float32(piece)
        _add_outputs(saved, extra_outputs)
        names = {value.name: _tensor_name(value) for value in piece.graph.initializers.values()}
        save_model(saved, self._path, replace=True)
        self._weights = {str(value.name): value.const_value for value in saved.graph.initializers.values()}
        for name, tensor in self._weights.items():
            if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
                _require_finite(tensor, names[name])
        self._session = _session(self._path, threads, providers)
        self.inputs = [str(item.name) for item in self._session.get_inputs()]
        self.outputs = [str(item.name) for item in self._session.get_outputs()]

    def weight(self, name: str) -> Array:
        """The initializer ``name`` as an array, fp32; a large one is mapped from the piece's file."""
        tensor = self._weights[name]
        assert tensor is not None
        return mapped_array(tensor)

    def run(self, feeds: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs; floating feeds are fp32."""
        return list(self._session.run(list(outputs), {name: feeds[name] for name in self.inputs}))

    def close(self) -> None:
        """End the session and delete the piece's files."""
        del self._session
        self._weights.clear()
        for path in (self._path, self._path.with_name(self._path.name + ".data")):
            path.unlink(missing_ok=True)


def _in_float32(piece: ir.Model) -> ir.Model:
    copy = piece.clone()
    for value in copy.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in _HALF_TYPES:
            value.const_value = weights.cast(value.const_value, ir.DataType.FLOAT)  # streams, unlike a tensor upcast
    upcast_to_float32(copy)
    return copy


def _add_outputs(piece: ir.Model, names: Sequence[str]) -> None:
    there = {value.name for value in piece.graph.outputs}
    made = {value.name: value for node in piece.graph for value in node.outputs}
    for name in names:
        if name not in there:
            piece.graph.outputs.append(made[name])


def _require_finite(tensor: ir.TensorProtocol, name: str) -> None:
    for block in read_blocks(tensor, _CHECKED_BYTES):
        if not np.isfinite(block).all():
            raise UserError(f"the weight {name} holds NaN or infinity: download the checkpoint again")


def _tensor_name(value: ir.Value) -> str:
    """What the user calls an initializer: the tensors of the checkpoint that it is made of."""
    if value.const_value is None or value.const_value.dtype not in _FLOAT_TYPES:
        return str(value.name)
    found = list(dict.fromkeys(leaf.name for leaf in leaves(value.const_value) if leaf.name))
    return " or ".join(map(repr, found[:4])) if found else repr(value.name)


def _session(path: Path, threads: int, providers: Sequence[str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Prepacking copies weights into memory; without it they stay mapped from the piece's file.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
