"""``inspect --html``: the report as one page that needs nothing else, no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qwenforge.engine.bundle_summary import summarize_bundle
from qwenforge.engine.inspection import Inspection, is_mixture_of_experts
from qwenforge.engine.layer_drawing import DrawnNode, draw, nodes_of_graph
from qwenforge.engine.layer_recognition import LayerMap
from qwenforge.engine.units import quantity, size, thousands
from qwenforge.manifest import Manifest

_TEMPLATE = "inspection.html.jinja"


def render_page(
    report: Inspection,
    layers: LayerMap,
    *,
    manifest: Manifest | None = None,
    before: Sequence[DrawnNode] = (),
) -> str:
    """The page for ``report``, whose layers' nodes are ``layers``; ``before`` is the layer as it was traced."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters.update(thousands=thousands, quantity=quantity, size=size)
    return environment.get_template(_TEMPLATE).render(
        report=report,
        facts=summarize_bundle(manifest) if manifest is not None else [],
        pictures=_pictures(layers, before),
    )


def _pictures(layers: LayerMap, before: Sequence[DrawnNode]) -> list[tuple[str, Markup]]:
    """Drawings with titles; the layer shown after is of the kind that was recorded before."""
    chosen = _layer_to_draw(layers, before)
    if chosen is None:
        return []
    index, nodes = chosen
    after = nodes_of_graph(nodes)
    # The drawing escapes every name itself.
    pictures = [(f"after: layer {index}, {len(after)} nodes", Markup(draw(after)))]
    if before:
        pictures.insert(0, (f"before: as traced, {len(before)} nodes", Markup(draw(before))))
    return pictures


def _layer_to_draw(layers: LayerMap, before: Sequence[DrawnNode]) -> tuple[int, list[ir.Node]] | None:
    by_kind: dict[bool, tuple[int, list[ir.Node]]] = {}
    for index in layers.indices:
        nodes = layers.nodes(index)
        by_kind.setdefault(is_mixture_of_experts(nodes), (index, nodes))
    wanted = not before or any(node.operator == "TopK" for node in before)
    return by_kind.get(wanted) or by_kind.get(not wanted)
