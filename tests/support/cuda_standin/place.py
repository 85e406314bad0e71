"""Run by the stand-in's Python: make a session and print, as JSON, where its nodes are (see ``__init__.py``)."""

from __future__ import annotations

import json
import sys

import onnxruntime

_VERBOSE = 1


def main(model: str, library: str, capture: str) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _VERBOSE  # what ONNX Runtime copies is in its log only
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if library:
        options.register_custom_ops_library(library)
    providers = [("CUDAExecutionProvider", {"enable_cuda_graph": capture}), "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model, options, providers=providers)
    nodes: dict[str, list[tuple[str, str]]] = {}
    for part in session.get_provider_graph_assignment_info():
        nodes.setdefault(part.ep_name, []).extend((node.op_type, node.name) for node in part.get_nodes())
    memory = session.get_input_memory_infos()
    inputs = {value.name: info.name for value, info in zip(session.get_inputs(), memory, strict=True)}
    print(json.dumps({"nodes": nodes, "inputs": inputs}))


main(*sys.argv[1:])
