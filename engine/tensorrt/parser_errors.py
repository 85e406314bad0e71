"""What TensorRT's parser and builder complain about, as one sentence: node, layer of the model, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_LAYER = re.compile(r"\blayers\.(\d+)\b")
_REMEDIES = (
    (r"Plugin not found", "the plugin library has no such plugin: build it again with 'make plugins'"),
    (r"Failed to open file", "a file of weights is missing: copy the whole bundle, or export it again"),
    (
        r"out of memory|OutOfMemory|Cuda Runtime \(2\)",
        "there is not enough GPU memory: free some, or lower --workspace",
    ),
    (r"No importer|UNSUPPORTED_NODE|unsupported", "export again for the TensorRT version that is installed here"),
    (r"has type .* but .* has type", "the graph mixes types: export it again with this version of qwenforge"),
)
_OTHERWISE = "export the bundle again with this version of qwenforge, and report it if it stays"


def parse_problem(parser: Any, errors: Sequence[str], version: str) -> str:
    """The sentence for a graph that ``parser`` refused; ``errors`` are the logger's, our plugins' among them."""
    first = parser.get_error(0) if parser.num_errors else None
    if first is None:
        return _sentence(f"TensorRT {version} does not take the graph", " ".join(errors[:1]))
    plugin = next((line for line in errors if line.startswith("QwenForge")), None)
    name, operator = _text(first, "node_name"), _text(first, "node_operator")
    description = plugin or _text(first, "desc")
    others = f" ({parser.num_errors - 1} more nodes)" if parser.num_errors > 1 else ""
    where = f"node {name} ({operator}){_layer(name)}" if name else "the graph"
    return _sentence(f"TensorRT {version} does not take {where}{others}", description)


def build_problem(errors: Sequence[str], version: str) -> str:
    """The sentence for a network that was parsed and could not be built."""
    first = next(
        (line for line in errors if line.startswith("QwenForge")), errors[0] if errors else "it gave no reason"
    )
    return _sentence(f"TensorRT {version} cannot build the engine{_layer(first)}", first)


def _sentence(what: str, reason: str) -> str:
    remedy = next((text for pattern, text in _REMEDIES if re.search(pattern, reason, re.IGNORECASE)), _OTHERWISE)
    short = " ".join(reason.split())
    return f"{what}: {short[:400]}{'...' if len(short) > 400 else ''}; {remedy}."


def _layer(text: str) -> str:
    found = _LAYER.search(text)
    return f" of decoder layer {found[1]}" if found else ""


def _text(error: Any, attribute: str) -> str:
    getter = getattr(error, attribute, None)
    return str(getter()) if getter is not None else ""
