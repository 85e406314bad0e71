"""``inspect --html``: the report as one page that needs nothing else, no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

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
        facts=bundle_facts(manifest) if manifest is not None else [],
        pictures=_pictures(layers, before),
    )


def bundle_facts(manifest: Manifest) -> list[tuple[str, list[tuple[str, str]]]]:
    """What a reader wants of the manifest: titled tables of names and values."""
    source, model, limits, verification = manifest.source, manifest.model, manifest.limits, manifest.verification
    heads = f"{model.num_attention_heads} for queries, {model.num_key_value_heads} for keys and values, of {model.head_dim}"
    geometry = [("layers", str(model.num_hidden_layers)), ("hidden size", str(model.hidden_size)), ("heads", heads)]
    if model.num_experts is not None:
        geometry.append(("experts", f"{model.num_experts}, {model.num_experts_per_tok} per token"))
    geometry.append(("vocabulary", thousands(model.vocab_size)))
    files = [(name, size(record.bytes)) for name, record in manifest.files.items()]
    files += [(name, f"{size(record.bytes)}, shared with the checkpoint") for name, record in manifest.linked_files.items()]
    return [
        (
            "export",
            [
                ("source", f"{source.path_name} ({source.model_type}, {source.dtype})"),
                ("target", f"{manifest.target}, {manifest.dtype}"),
                ("context", f"{thousands(limits.max_length)} tokens"),
                ("batch", "any" if limits.max_batch is None else f"at most {limits.max_batch}"),
                ("created", manifest.created),
                ("by", f"qwenforge {manifest.qwenforge_version}"),
            ],
        ),
        ("model", geometry),
        ("verification", _verification(manifest)),
        ("files", files),
    ] + ([("tools", list(manifest.tool_versions.items()))] if manifest.tool_versions else [])


def _verification(manifest: Manifest) -> list[tuple[str, str]]:
    record = manifest.verification
    if not record.performed:
        return [("performed", "no (--no-verify)")]
    rows: list[tuple[str, object]] = [
        ("performed", f"yes, {record.method}"),
        ("reference", record.reference),
        ("prompts", record.prompts),
        ("greedy tokens each", record.new_tokens),
        ("greatest logit error", None if record.max_abs_error is None else f"{record.max_abs_error:.2g}"),
        ("bound", None if record.bound is None else f"{record.bound:.2g}"),
        ("KL divergence", None if record.kl is None else f"{record.kl:.2g} nats"),
        ("greedy tokens agree", None if record.greedy_match is None else "yes" if record.greedy_match else "no"),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


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
