"""README.md of a TensorRT bundle: how to build and look at the engine with our program and with NVIDIA's own tools."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from qwenforge import names
from qwenforge.manifest import MODEL_NAME, POLYGRAPHY_NETWORK, BundleFacts, LoweringRecord, TensorSpec

PLUGIN_LIBRARY = "libqwenforge_plugins.so"
TYPICAL_PROMPT = 512
"""Prompt tokens that the prefill profile is tuned for unless the user says otherwise."""
POLYGRAPHY_SCRIPT = f'''\
"""The network of {MODEL_NAME} for polygraphy, whose --plugins opens a library without registering its plugins."""

import os

import tensorrt as trt
from polygraphy.backend.trt import network_from_onnx_path


def load_network():
    library = os.environ.get("QWENFORGE_PLUGIN_LIBRARY", "{PLUGIN_LIBRARY}")
    trt.get_plugin_registry().load_library(os.path.abspath(library))
    return network_from_onnx_path("{MODEL_NAME}", strongly_typed=trt.__version__.startswith("10."))
'''
"""polygraphy_network.py of a bundle that needs the plugin library."""


@dataclass(frozen=True)
class ProfileShapes:
    """The shapes of the dynamic inputs in one optimization profile, as trtexec and polygraphy write them."""

    name: str
    minimum: dict[str, tuple[int, ...]]
    typical: dict[str, tuple[int, ...]]
    maximum: dict[str, tuple[int, ...]]

    def trtexec(self) -> list[str]:
        """The three arguments."""
        return [
            f"--{kind}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
            for kind, shapes in self._rows()
        ]

    def polygraphy(self) -> list[str]:
        """The three arguments."""
        return [
            f"--trt-{kind}-shapes "
            + " ".join(f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items())
            for kind, shapes in self._rows()
        ]

    def _rows(self) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
        return [("min", self.minimum), ("opt", self.typical), ("max", self.maximum)]


def profile_shapes(facts: BundleFacts) -> list[ProfileShapes]:
    """The prefill and the decode profile that ``qwenforge build`` uses by default."""
    length, batch = facts.limits.max_length, facts.limits.max_batch or 1
    bound = {spec.name for spec in facts.weight_inputs}
    dynamic = [spec for spec in facts.inputs if spec.name not in bound]

    def shapes(rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
        sizes = {names.BATCH: rows, names.SEQUENCE: tokens, names.LOGITS_COUNT: 1, names.CAPACITY: length}
        return {spec.name: _sized(spec, sizes) for spec in dynamic}

    prompt = min(TYPICAL_PROMPT, length)
    return [
        ProfileShapes("prefill", shapes(1, 1), shapes(1, prompt), shapes(batch, length)),
        ProfileShapes("decode", shapes(1, 1), shapes(1, 1), shapes(batch, 1)),
    ]


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
        profiles=profile_shapes(facts),
        library=PLUGIN_LIBRARY if plugins else None,
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


def needs_plugins(record: LoweringRecord) -> bool:
    """Whether an engine of a graph lowered so needs the plugin library."""
    return record.attention != "native" or record.moe == "plugin"


def build_command(bundle: str, device: str | None) -> str:
    """The command that makes the engine of ``bundle``."""
    return f"qwenforge build {bundle}" + (f" --device {device}" if device else "")


def _sized(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)
