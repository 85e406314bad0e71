"""What a graph lowered for a GPU answers, its own nodes run from reference bodies."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwenforge.graph_passes.lower.reference_bodies import expand_target_nodes
from support.cached_decoder import CachedDecoder, random_tokens
from support.small_graphs import Array

CAPACITY = 16
"""Of the caches, in tokens."""


def answers(model: ir.Model) -> tuple[Array, Array]:
    """Right-padded rows and decode at different positions; one row in chunks, into the last place of the cache."""
    model = model.clone()
    expand_target_nodes(model)
    decoder = CachedDecoder(model, batch=3, capacity=CAPACITY)
    rows = [random_tokens(count, seed=count) for count in (9, 4, 1)]
    first = [*decoder.step(rows, pad=5), *decoder.step([[7], [8], [9]])]
    alone, tokens = CachedDecoder(model, capacity=CAPACITY), random_tokens(CAPACITY, seed=1)
    parts = [tokens[:6], tokens[6:11], tokens[11:15], tokens[15:]]
    return np.concatenate(first), np.concatenate([logits for part in parts for logits in alone.step([part])])
