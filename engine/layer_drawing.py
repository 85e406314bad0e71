"""One decoder layer as an SVG picture: its operators as boxes, weights named in them, arrows for the values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from typing import Any

import onnx_ir as ir

from qwenforge.engine.graph_layout import Box, layout
from qwenforge.errors import BundleError

_CHARACTER = 6.6
_LINE = 14.0
_MARGIN = 8.0
_MAX_TEXT = 52
_MANY_READERS = 3
_PARAMETER = re.compile(r"\.(?:weight|bias|gate_up_proj|down_proj|gate_up|down)$")


@dataclass(frozen=True)
class DrawnNode:
    """An operator: its kind, the values between operators that it reads and makes, and the weights it holds."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()


def nodes_of_graph(nodes: Iterable[ir.Node]) -> list[DrawnNode]:
    """The ``nodes`` of a graph to draw; initializers become their node's weights, constants without a path vanish."""
    drawn = []
    for node in nodes:
        inputs = [value for value in node.inputs if value is not None and value.name]
        weights = [value for value in inputs if value.is_initializer()]
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        drawn.append(
            DrawnNode(
                operator,
                tuple(value.name or "" for value in inputs if not value.is_initializer()),
                tuple(value.name or "" for value in node.outputs),
                tuple(_short(value.name or "") for value in weights if "." in (value.name or "")),
            )
        )
    return drawn


def nodes_of_record(record: Any) -> list[DrawnNode]:
    """The traced layer that the exporter recorded: a list of ``{"op", "inputs", "outputs", "name"}``.

    Raises BundleError when ``record`` has another form.
    """
    drawn = []
    try:
        for node in record:
            inputs = [str(name) for name in node["inputs"] if name]
            weights = [name for name in inputs if _PARAMETER.search(name)]
            drawn.append(
                DrawnNode(
                    str(node["op"]),
                    tuple(name for name in inputs if name not in weights),
                    tuple(str(name) for name in node["outputs"]),
                    tuple(_short(name) for name in weights),
                )
            )
    except (KeyError, TypeError) as error:
        raise BundleError("layer_before.json has an unknown form; export the bundle again") from error
    return drawn


def draw(nodes: Sequence[DrawnNode]) -> str:
    """An ``<svg>`` element, styled by the classes ``op``, ``fused``, ``port`` and ``edge`` of the page around it.

    Constants, and what is computed from nothing but constants, are left out. A value from outside is drawn as a port,
    one for all its readers, or one for each where many read it.
    """
    nodes = _without_constants(nodes)
    maker = {name: index for index, node in enumerate(nodes) for name in node.outputs}
    readers = Counter(name for node in nodes for name in set(node.inputs) if name not in maker)
    ports: dict[tuple[str, int | None], int] = {}
    edges: set[tuple[int, int]] = set()
    for index, node in enumerate(nodes):
        for name in node.inputs:
            port = (name, index if readers[name] > _MANY_READERS else None)
            start = maker[name] if name in maker else ports.setdefault(port, len(nodes) + len(ports))
            edges.add((start, index))
    texts = [[node.operator, *node.weights] for node in nodes] + [[_short(name)] for name, _ in ports]
    texts = [[_clip(line) for line in lines] for lines in texts]
    sizes = [(max(len(line) for line in lines) * _CHARACTER + 16, len(lines) * _LINE + 8) for lines in texts]
    placed = layout(sizes, sorted(edges))
    width, height = placed.width + 2 * _MARGIN, placed.height + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{-_MARGIN} {-_MARGIN} {width:.0f} {height:.0f}">'
    ]
    parts += [f'<path class="edge" d="{_curve(path)}"/>' for path in placed.paths]
    for index, (box, lines) in enumerate(zip(placed.boxes, texts, strict=True)):
        parts.append(_box(box, lines, "port" if index >= len(nodes) else _style(nodes[index].operator)))
    return "".join([*parts, "</svg>"])


def _without_constants(nodes: Sequence[DrawnNode]) -> list[DrawnNode]:
    kept: list[DrawnNode] = []
    constant: set[str] = set()
    for node in nodes:
        if all(name in constant for name in node.inputs) and not node.weights:
            constant.update(node.outputs)
        else:
            kept.append(replace(node, inputs=tuple(name for name in node.inputs if name not in constant)))
    return kept


def _box(box: Box, lines: list[str], style: str) -> str:
    rows = "".join(
        f'<text class="{"name" if row == 0 else "weight"}" x="{box.x:.1f}" y="{box.y + 15 + row * _LINE:.1f}">'
        f"{escape(line)}</text>"
        for row, line in enumerate(lines)
    )
    place = f'x="{box.x - box.width / 2:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    return f'<g class="{style}"><rect {place} rx="4"/>{rows}</g>'


def _style(operator: str) -> str:
    fused = re.search(r"Attention|MixtureOfExperts|MoE|RMSNorm|LayerNorm|QuickGelu|Swish|RotaryEmb", operator)
    return "op fused" if fused else "op"


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """A smooth path through ``points``, vertical at each of them."""
    text = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        text += f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    return text


def _short(name: str) -> str:
    """``name`` without the path of its layer."""
    return re.sub(r"^.*?layers?[./]\d+[./]", "", name)


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT // 2 - 1]}…{text[-_MAX_TEXT // 2 :]}"
