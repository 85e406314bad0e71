"""A layered drawing of a small directed acyclic graph: ranks by longest path, edges routed through the gaps.

The classic scheme (Sugiyama, Tagawa, Toda: "Methods for visual understanding of hierarchical system structures",
1981): long edges get a dummy box on every rank they cross, the order within ranks is improved by barycentres, and
boxes are then pulled towards their neighbours as far as the order allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

RANK_GAP = 30.0
BOX_GAP = 16.0
_DUMMY_WIDTH = 8.0
_SWEEPS = 12


@dataclass
class Box:
    """A box of ``width`` x ``height``; ``x`` is its centre and ``y`` its top once laid out."""

    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    rank: int = 0
    above: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """The boxes placed, each edge as the points it runs through, and the size of the whole drawing."""

    boxes: tuple[Box, ...]
    paths: tuple[tuple[tuple[float, float], ...], ...]
    width: float
    height: float


def layout(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]]) -> Layout:
    """Place boxes of the given (width, height) so that every edge (from, to) points downwards.

    Raises ValueError when the edges form a cycle.
    """
    boxes = [Box(width, height) for width, height in sizes]
    _assign_ranks(boxes, edges)
    chains = [_insert_dummies(boxes, start, end) for start, end in edges]
    ranks: list[list[int]] = [[] for _ in range(max((box.rank for box in boxes), default=-1) + 1)]
    for index, box in enumerate(boxes):
        ranks[box.rank].append(index)
    _order(boxes, ranks)
    _place(boxes, ranks)
    left = min((box.x - box.width / 2 for box in boxes), default=0.0)
    top = 0.0
    for rank in ranks:
        height = max(boxes[index].height for index in rank)
        for index in rank:
            boxes[index].x -= left
            if index >= len(sizes):
                boxes[index].height = height  # the edge runs straight past its neighbours and bends in the gaps
            boxes[index].y = top + (height - boxes[index].height) / 2
        top += height + RANK_GAP
    width = max((box.x + box.width / 2 for box in boxes), default=0.0)
    paths = tuple(_path(boxes, chain) for chain in chains)
    return Layout(tuple(boxes[: len(sizes)]), paths, width, max(top - RANK_GAP, 0.0))


def _assign_ranks(boxes: list[Box], edges: Sequence[tuple[int, int]]) -> None:
    """Longest path from the sources; then every box sinks to just above the first box that it leads to."""
    followers: list[list[int]] = [[] for _ in boxes]
    waiting = [0] * len(boxes)
    for start, end in edges:
        followers[start].append(end)
        waiting[end] += 1
    ready = [index for index, count in enumerate(waiting) if count == 0]
    done: list[int] = []
    while ready:
        index = ready.pop()
        done.append(index)
        for follower in followers[index]:
            boxes[follower].rank = max(boxes[follower].rank, boxes[index].rank + 1)
            waiting[follower] -= 1
            if waiting[follower] == 0:
                ready.append(follower)
    if len(done) != len(boxes):
        raise ValueError("the graph has a cycle")
    for index in reversed(done):
        if followers[index]:
            boxes[index].rank = min(boxes[follower].rank for follower in followers[index]) - 1


def _insert_dummies(boxes: list[Box], start: int, end: int) -> list[int]:
    """Replace the edge by a chain with one dummy on every rank between; returns the chain."""
    chain = [start]
    for rank in range(boxes[start].rank + 1, boxes[end].rank):
        boxes.append(Box(_DUMMY_WIDTH, 0.0, rank=rank))
        chain.append(len(boxes) - 1)
    chain.append(end)
    for upper, lower in pairwise(chain):
        boxes[upper].below.append(lower)
        boxes[lower].above.append(upper)
    return chain


def _order(boxes: list[Box], ranks: list[list[int]]) -> None:
    """Sort each rank by the mean position of its neighbours in the rank before, downwards and upwards in turn."""
    position = {index: float(place) for rank in ranks for place, index in enumerate(rank)}

    def key(index: int, downwards: bool) -> float:
        neighbours = boxes[index].above if downwards else boxes[index].below
        if not neighbours:
            return position[index]
        return sum(position[neighbour] for neighbour in neighbours) / len(neighbours)

    for sweep in range(_SWEEPS):
        downwards = sweep % 2 == 0
        for rank in ranks if downwards else ranks[::-1]:
            keys = {index: key(index, downwards) for index in rank}
            rank.sort(key=lambda index: keys[index])
            # Centred, so that ranks of different sizes compare.
            position.update({index: place - (len(rank) - 1) / 2 for place, index in enumerate(rank)})


def _place(boxes: list[Box], ranks: list[list[int]]) -> None:
    for rank in ranks:
        x = 0.0
        for index in rank:
            boxes[index].x = x + boxes[index].width / 2
            x += boxes[index].width + BOX_GAP
        for index in rank:
            boxes[index].x -= x / 2
    for sweep in range(2 * _SWEEPS):
        for rank in ranks if sweep % 2 == 0 else ranks[::-1]:
            wishes = []
            for index in rank:
                box = boxes[index]
                neighbours = (box.above if sweep % 2 == 0 else box.below) or [index]
                wishes.append(sum(boxes[neighbour].x for neighbour in neighbours) / len(neighbours))
            _settle(boxes, rank, wishes)


def _settle(boxes: list[Box], rank: list[int], wishes: list[float]) -> None:
    """Put each box of a rank where it wishes; boxes that would overlap form a block that stands at its mean wish."""
    blocks: list[list[tuple[int, float]]] = []
    for index, wish in zip(rank, wishes, strict=True):
        blocks.append([(index, wish)])
        while len(blocks) > 1 and _right(boxes, blocks[-2]) + BOX_GAP > _left(boxes, blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    for block in blocks:
        x = _left(boxes, block)
        for index, _ in block:
            boxes[index].x = x + boxes[index].width / 2
            x += boxes[index].width + BOX_GAP


def _extent(boxes: list[Box], block: list[tuple[int, float]]) -> float:
    return sum(boxes[index].width for index, _ in block) + BOX_GAP * (len(block) - 1)


def _left(boxes: list[Box], block: list[tuple[int, float]]) -> float:
    offset, total = 0.0, 0.0
    for index, wish in block:
        total += wish - offset - boxes[index].width / 2
        offset += boxes[index].width + BOX_GAP
    return total / len(block)


def _right(boxes: list[Box], block: list[tuple[int, float]]) -> float:
    return _left(boxes, block) + _extent(boxes, block)


def _path(boxes: list[Box], chain: list[int]) -> tuple[tuple[float, float], ...]:
    first, last = boxes[chain[0]], boxes[chain[-1]]
    dummies = [boxes[index] for index in chain[1:-1]]
    middle = [point for box in dummies for point in ((box.x, box.y), (box.x, box.y + box.height))]
    return ((first.x, first.y + first.height), *middle, (last.x, last.y))
