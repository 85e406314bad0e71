"""Custom ops in ONNX Runtime: the library with emulated kernels, for its CPU build, and graphs of one QwenForgeMoE."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

from qwenforge.op_spec import NAMESPACE, OpSpec
from support.plugin_library import cuda_folder, plugin_library
from support.simt import ON_GPU
from support.source_tree import ROOT

PLUGINS = ROOT / "plugins"
SPEC = OpSpec.model_validate(yaml.safe_load((PLUGINS / "moe" / "op.yaml").read_text(encoding="utf-8")))
_SIMT = ROOT / "tests" / "support" / "simt"
_SOURCES = ["common/contract.cpp", "common/fields.cpp", "attention/attention_op.cpp", "moe/moe_op.cpp"]
_SOURCES += ["moe/cutlass/grouped_missing.cpp"]
_ELEMENT = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT}


class CompileError(Exception):
    """The library does not compile for the CPU."""


def ort_library() -> Path:
    """libqwenforge_ort.so as CMake builds it, for CUDA."""
    return plugin_library().with_name("libqwenforge_ort.so")


@functools.cache
def emulated_library() -> Path:
    """The same sources compiled with the emulator, for the CPU execution provider; made once for its sources.

    Raises:
        CompileError: with the compiler's words.
    """
    sources = [*(PLUGINS / "onnxruntime").glob("*.cpp"), *(PLUGINS / name for name in _SOURCES)]
    sources.append(ROOT / "tests" / "cpp" / "cuda_stub.cpp")
    kernels = [path for op in ("attention", "moe") for path in sorted((PLUGINS / op).glob("*.cu"))]
    folders = ("attention", "common", "moe", "onnxruntime")
    read = [path for name in folders for path in (PLUGINS / name).rglob("*") if path.is_file()]
    read = [path for path in read if path.suffix not in (".pyc", ".md")] + [*_SIMT.glob("*.h"), sources[-1]]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(read))).hexdigest()[:16]
    place = ROOT / "build" / "simt"
    place.mkdir(parents=True, exist_ok=True)
    library, generated = place / f"libort-{digest}.so", place / f"generated-{digest}"
    cuda = cuda_folder()
    assert cuda is not None
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-DQWENFORGE_SIMT"]
    command += ['-DQWENFORGE_VERSION="0"', "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{PLUGINS}", f"-I{generated}"]
    command += [f"-I{_SIMT}", "-isystem", str(cuda / "include"), *map(str, sources), "-x", "c++", *map(str, kernels)]
    command += [f"-Wl,--no-undefined,--version-script={PLUGINS / 'onnxruntime' / 'exports.map'}"]
    with (place / "ort-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            generate_headers(generated)
            partial = library.with_suffix(".partial")
            finished = subprocess.run([*command, "-o", partial], capture_output=True, text=True, check=False)
            if finished.returncode:
                raise CompileError(finished.stderr[:4000])
            partial.rename(library)
    return library


def generate_headers(folder: Path) -> None:
    """``attention_spec.h`` and ``moe_spec.h`` in ``folder``."""
    generator = ROOT / "cmake" / "generate_spec_header.py"
    for op in ("attention", "moe"):
        subprocess.run([sys.executable, generator, op, folder / f"{op}_spec.h"], check=True)


def moe_model(
    attributes: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    dtype: str,
    *,
    casts: Mapping[str, str] | None = None,
    tokens: int | str = "tokens",
) -> onnx.ModelProto:
    """One QwenForgeMoE node named ``layer 3``, its weights initializers.

    Graph inputs are ``hidden_states`` and ``router_logits``, and with shared experts ``shared_gate_logits``, each named
    with a ``_float`` behind: float32, cast to ``dtype`` or to what ``casts`` says. The output is cast back.

    Args:
        tensors: initializers by the op's names for them; inputs that are nowhere are left out.
    """
    widths = {"hidden_states": attributes.get("hidden_size"), "router_logits": attributes.get("num_experts")}
    if attributes.get("num_shared_experts"):
        widths["shared_gate_logits"] = 1
    widths = {name: width for name, width in widths.items() if name not in tensors}
    given = [item.name if item.name in {*widths, *tensors} else "" for item in SPEC.inputs]
    while not given[-1]:
        given.pop()
    nodes = []
    for name in widths:
        to = _ELEMENT[(casts or {}).get(name, dtype)]
        nodes.append(helper.make_node("Cast", [f"{name}_float"], [name], to=to))
    nodes.append(helper.make_node(SPEC.name, given, ["y"], domain=NAMESPACE, name="layer 3", **attributes))
    nodes.append(helper.make_node("Cast", ["y"], ["output"], to=TensorProto.FLOAT))
    infos = [
        helper.make_tensor_value_info(f"{name}_float", TensorProto.FLOAT, [tokens, width])
        for name, width in widths.items()
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "moe", infos, [output], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(NAMESPACE, int(SPEC.version))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model: onnx.ModelProto, library: Path | None = None, provider: str | None = None) -> Any:
    """An ``onnxruntime.InferenceSession`` with the ops of ``library``.

    If nothing is said, they are emulated on the CPU. With QWENFORGE_KERNELS_ON=cuda in the environment they are those
    of the built library, on the GPU; that needs onnxruntime-gpu.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library or (ort_library() if ON_GPU else emulated_library())))
    chosen = provider or ("CUDAExecutionProvider" if ON_GPU else "CPUExecutionProvider")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[chosen])
