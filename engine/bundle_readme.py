"""README.md of a TensorRT bundle: how to build and look at the engine with our program and with NVIDIA's own tools."""

from __future__ import annotations

from importlib import resources

from qwenforge import names
from qwenforge.engine.tensorrt.compatibility import build_command
from qwenforge.engine.tensorrt.plugin_library import LIBRARY, VARIABLE
from qwenforge.engine.tensorrt.profiles import profile_shapes
from qwenforge.manifest import MODEL_NAME, POLYGRAPHY_NETWORK, BundleFacts, ProfileRecord
from qwenforge.tensorrt_choice import needs_plugins

POLYGRAPHY_SCRIPT = f'''\
"""The network of {MODEL_NAME} for polygraphy, whose --plugins opens a library without registering its plugins."""

import os

import tensorrt as trt
from polygraphy.backend.trt import network_from_onnx_path


def load_network():
    library = os.environ.get("{VARIABLE}", "{LIBRARY}")
    trt.get_plugin_registry().load_library(os.path.abspath(library))
    return network_from_onnx_path("{MODEL_NAME}", strongly_typed=trt.__version__.startswith("10."))
'''
"""polygraphy_network.py of a bundle that needs the plugin library."""


def trtexec_shapes(profile: ProfileRecord) -> list[str]:
    """The three arguments of trtexec."""
    return [
        f"--{kind}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
        for kind, shapes in _rows(profile)
    ]


def polygraphy_shapes(profile: ProfileRecord) -> list[str]:
    """The three arguments of polygraphy."""
    return [
        f"--trt-{kind}-shapes " + " ".join(f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items())
        for kind, shapes in _rows(profile)
    ]


def _rows(profile: ProfileRecord) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    return [("min", profile.minimum), ("opt", profile.typical), ("max", profile.maximum)]


def tensorrt_readme(facts: BundleFacts) -> str:
    """The text of the file."""
    import jinja2

    record = facts.lowering
    if record is None:
        raise ValueError("the bundle was not lowered for TensorRT")
    plugins = needs_plugins(record)
    aliased = record.attention != "native"
    source = resources.files("qwenforge.engine").joinpath("bundle_readme.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(
        facts=facts,
        record=record,
        model=MODEL_NAME,
        network=POLYGRAPHY_NETWORK if plugins else MODEL_NAME,
        profiles=[(trtexec_shapes(profile), polygraphy_shapes(profile)) for profile in profile_shapes(facts)],
        library=LIBRARY if plugins else None,
        aliased=aliased,
        ranges=[f"{name}:[0,{largest}]" for name, largest in _largest_values(facts).items()],
        strongly_typed=record.tensorrt.startswith("10."),
        tool="tensorrt_rtx" if record.tensorrt == "rtx" else "trtexec",
        build=build_command("BUNDLE", record.device),
    )


def _largest_values(facts: BundleFacts) -> dict[str, int]:
    """What random integers may go up to: beyond, a token or a place in the cache does not exist."""
    first = dict.fromkeys((names.POSITION_IDS, names.CACHE_POSITION, names.LOGITS_INDEX), 0)
    return {names.INPUT_IDS: facts.model.vocab_size - 1, **first}
