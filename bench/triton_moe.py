"""A fused mixture of experts in Triton, written to be compared with: not part of the product.

Pairs are sorted by expert and each expert's padded to whole tiles, without asking the host; one kernel computes gate,
up and the activation of a tile, a second the product down, weighted; torch sums a token's slots in their order. Tiles
are of the usual sizes for few and for many tokens an expert, the best one chosen by Triton's autotuner.
"""

from __future__ import annotations

import functools
from typing import Any

_FEW = ((32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 4, 4))
_MANY = ((64, 64, 4, 3), (128, 32, 4, 4), (128, 64, 8, 3), (128, 64, 4, 3))
"""Weight rows and depth of a tile, warps and stages."""


@functools.cache
def kernels(few: bool) -> tuple[Any, Any]:
    """The two products, to be tuned for few or for many pairs an expert; made here because Triton may be missing."""
    global tl
    import triton
    import triton.language as tl

    sizes = _FEW if few else _MANY
    configs = [triton.Config({"ROWS": n, "DEPTH": k}, num_warps=w, num_stages=s) for n, k, w, s in sizes]

    @triton.jit
    def project_up(
        x, weights, hidden, pair_at, expert_of, tokens_slots, slots, width, depth,
        TILE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(1)
        expert = tl.load(expert_of + tile)
        if expert < 0:
            return
        places = tile * TILE + tl.arange(0, TILE)
        pairs = tl.load(pair_at + places)
        valid = pairs < tokens_slots
        columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        steps = tl.arange(0, DEPTH)
        inputs = x + (pairs // slots).to(tl.int64)[:, None] * depth + steps[None, :]
        first = weights + expert.to(tl.int64) * 2 * width * depth + columns[None, :] * depth + steps[:, None]
        gate = tl.zeros((TILE, ROWS), tl.float32)
        up = tl.zeros((TILE, ROWS), tl.float32)
        for start in range(0, depth, DEPTH):
            inside = steps < depth - start
            a = tl.load(inputs + start, mask=valid[:, None] & inside[None, :], other=0.0)
            mask = inside[:, None] & (columns < width)[None, :]
            gate += tl.dot(a, tl.load(first + start, mask=mask, other=0.0))
            up += tl.dot(a, tl.load(first + width * depth + start, mask=mask, other=0.0))
        active = gate * tl.sigmoid(gate) * up
        target = hidden + places.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(target, active.to(hidden.dtype.element_ty), mask=valid[:, None] & (columns < width)[None, :])

    @triton.jit
    def project_down(
        hidden, weights, partial, shares, pair_at, expert_of, tokens_slots, rows, depth,
        TILE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(1)
        expert = tl.load(expert_of + tile)
        if expert < 0:
            return
        places = tile * TILE + tl.arange(0, TILE)
        pairs = tl.load(pair_at + places)
        valid = pairs < tokens_slots
        columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        steps = tl.arange(0, DEPTH)
        inputs = hidden + places.to(tl.int64)[:, None] * depth + steps[None, :]
        first = weights + expert.to(tl.int64) * rows * depth + columns[None, :] * depth + steps[:, None]
        total = tl.zeros((TILE, ROWS), tl.float32)
        for start in range(0, depth, DEPTH):
            inside = steps < depth - start
            a = tl.load(inputs + start, mask=valid[:, None] & inside[None, :], other=0.0)
            total += tl.dot(a, tl.load(first + start, mask=inside[:, None] & (columns < rows)[None, :], other=0.0))
        share = tl.load(shares + pairs, mask=valid, other=0.0)
        target = partial + pairs.to(tl.int64)[:, None] * rows + columns[None, :]
        weighted = (total * share[:, None]).to(partial.dtype.element_ty)
        tl.store(target, weighted, mask=valid[:, None] & (columns < rows)[None, :])

    tune_up = triton.autotune(configs, key=["width", "depth", "TILE"])
    tune_down = triton.autotune(configs, key=["rows", "depth", "TILE"])
    return tune_up(project_up), tune_down(project_down)


def fused_experts(x: Any, ids: Any, shares: Any, gate_up: Any, down: Any) -> Any:
    """The layer for x [T, C]: ids and shares [T, S], gate_up [E', 2 I, C] (the gate's rows first), down [E', C, I].

    Raises:
        ImportError: Triton is not installed.
    """
    import torch

    slots, stored = ids.shape[1], gate_up.shape[0]
    pairs, width, hidden = ids.numel(), gate_up.shape[1] // 2, gate_up.shape[2]
    average = pairs / stored
    tile = 16 if average <= 16 else 32 if average <= 48 else 64 if average <= 128 else 128
    tiles = pairs // tile + min(pairs, stored)
    pair_at, expert_of = _tiles(ids.flatten(), stored, tile, tiles)
    active = torch.empty(tiles * tile, width, dtype=x.dtype, device=x.device)
    partial = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
    project_up, project_down = kernels(tile <= 32)
    project_up[lambda meta: (-(-width // meta["ROWS"]), tiles)](
        x, gate_up, active, pair_at, expert_of, pairs, slots, width, hidden, TILE=tile
    )
    project_down[lambda meta: (-(-hidden // meta["ROWS"]), tiles)](
        active, down, partial, shares.flatten().contiguous(), pair_at, expert_of, pairs, hidden, width, TILE=tile
    )
    return partial.view(-1, slots, hidden).sum(1, dtype=torch.float32).to(x.dtype)


def _tiles(flat: Any, stored: int, tile: int, tiles: int) -> tuple[Any, Any]:
    """Pair by place, ``flat.numel()`` where a place is empty, and the expert of each tile, -1 for none."""
    import torch

    order = flat.argsort(stable=True)
    counts = torch.zeros(stored, dtype=torch.int64, device=flat.device)
    counts.index_add_(0, flat, torch.ones_like(flat))
    whole = (counts + tile - 1) // tile
    first_tile, first_pair = whole.cumsum(0) - whole, counts.cumsum(0) - counts
    sorted_expert = flat[order]
    rank = torch.arange(flat.numel(), device=flat.device) - first_pair[sorted_expert]
    pair_at = torch.full((tiles * tile,), flat.numel(), dtype=torch.int32, device=flat.device)
    pair_at[first_tile[sorted_expert] * tile + rank] = order.to(torch.int32)
    numbers = torch.arange(tiles, device=flat.device)
    owner = torch.searchsorted(whole.cumsum(0), numbers, right=True).clamp(max=stored - 1)
    return pair_at, torch.where(numbers < whole.sum(), owner, -1).to(torch.int32)
