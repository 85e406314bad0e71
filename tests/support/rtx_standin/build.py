"""Parse a graph and build an engine of it, inside the stand-in: ``python build.py MODEL.onnx [--plugins LIBRARY]``.

Prints one JSON object. Two profiles, prompts and single tokens, with batch and sequence dynamic in the first. Nothing
of qwenforge is used, so that what is proven is the graph alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import tensorrt as trt


class Logger(trt.ILogger):
    """Keeps what TensorRT says of severity warning and above."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.WARNING:
            self.lines.append(f"{severity.name}: {message}")


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--plugins", type=Path)
    arguments.add_argument("--max-batch", type=int, default=4)
    arguments.add_argument("--max-sequence", type=int, default=512)
    arguments.add_argument("--parse-only", action="store_true")
    given = arguments.parse_args()
    logger = Logger()
    started = time.perf_counter()
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    if given.plugins is not None:
        builder.get_plugin_registry().load_library(str(given.plugins))
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    network = builder.create_network(0)  # strongly typed: TensorRT 11 and RTX know no other kind
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(given.model)):
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        print(json.dumps({"parsed": False, "errors": errors + logger.lines}))
        return 1
    if given.parse_only:
        print(json.dumps({"parsed": True, "layers": network.num_layers}))
        return 0
    for longest, typical in ((given.max_sequence, given.max_sequence // 4), (1, 1)):
        config.add_optimization_profile(_profile(builder, network, given.max_batch, typical, longest))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        print(json.dumps({"parsed": True, "built": False, "errors": logger.lines}))
        return 1
    kinds = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    report = {
        "parsed": True,
        "built": True,
        "layers": network.num_layers,
        "kinds": dict(kinds),
        "inputs": network.num_inputs,
        "outputs": {network.get_output(i).name: network.get_output(i).dtype.name for i in range(network.num_outputs)},
        "engine_bytes": engine.nbytes,
        "seconds": time.perf_counter() - started,
        "peak_bytes": _peak_bytes(),
        "warnings": logger.lines,
    }
    print(json.dumps(report))
    return 0


def _peak_bytes() -> int:
    """This process's own high-water mark; getrusage's begins with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def _profile(
    builder: trt.Builder, network: trt.INetworkDefinition, batch: int, typical: int, longest: int
) -> trt.IOptimizationProfile:
    """Dynamic dimensions by position: the first of an input is the batch, the second of tokens the sequence."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        sizes = [(1, 1), (1, typical), (batch, longest)]
        if tensor.name == "logits_index":
            sizes = [(1, 1), (1, 1), (batch, 1)]
        profile.set_shape(
            tensor.name,
            *(tuple(size[axis] if dim == -1 else dim for axis, dim in enumerate(shape)) for size in sizes),
        )
    return profile


if __name__ == "__main__":
    sys.exit(main())
