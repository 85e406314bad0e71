"""libqwenforge_ort.so: what it exports and needs, ONNX Runtime's interface, and its kernels' use of a stream."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from support import simt
from support.attention_cases import Call
from support.attention_nodes import attention_model
from support.moe_cases import Case, Weights
from support.ort_custom_op import PLUGINS, generate_headers, moe_model, ort_library, session
from support.plugin_library import cmake, cuda_folder, why_missing
from support.source_tree import ROOT

needs_library = pytest.mark.skipif(bool(why_missing()), reason=why_missing() or "-")
needs_kernels = pytest.mark.skipif(bool(simt.why_missing()), reason=simt.why_missing() or "-")
CPP = ROOT / "tests" / "cpp"


@needs_kernels
@pytest.mark.parametrize("program", ["ort_kernel", "ort_attention"])
def test_kernel_keeps_to_its_stream_and_gives_everything_back(program: str, tmp_path: Path) -> None:
    """Against a stand-in for ONNX Runtime with a stream, whose every call fails once; sanitized."""
    generate_headers(tmp_path)
    command = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fsanitize=address,undefined"]
    command += [f"-I{PLUGINS}", f"-I{CPP}", f"-I{tmp_path}", "-isystem", f"{cuda_folder()}/include"]
    command += ["-fno-sanitize-recover=undefined", str(CPP / f"{program}.cpp"), str(CPP / "cuda_stub.cpp")]
    sources = ["onnxruntime/kernel.cpp", "onnxruntime/ort_values.cpp", "onnxruntime/shape_inference.cpp"]
    sources += ["common/contract.cpp", "common/fields.cpp"]
    command += [*(str(PLUGINS / source) for source in sources), "-o", str(tmp_path / "checks")]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    finished = subprocess.run([tmp_path / "checks"], capture_output=True, text=True, check=False, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def _moe() -> onnx.ModelProto:
    case = Case(shared=1)
    return moe_model(case.attributes, Weights.random(case).tensors, case.dtype)


@needs_library
@pytest.mark.parametrize(
    ("op", "model"),
    [
        ("QwenForgeMoE", _moe),
        ("QwenForgeAttention", lambda: attention_model(Call(), "float16")),
        ("QwenForgeAttention", lambda: attention_model(Call(packed=True, norm=True), "bfloat16")),
        ("QwenForgeAttention", lambda: attention_model(Call(cache="int8", page_size=16), "bfloat16")),
    ],
    ids=["moe", "attention", "packed attention", "int8 attention"],
)
def test_library_is_registered_and_its_ops_wait_for_cuda(op: str, model: Callable[[], onnx.ModelProto]) -> None:
    """The graph passes ONNX Runtime's checks against the op's schema, and the op is asked for a kernel."""
    with pytest.raises(Exception, match=f"{op} 'layer 3': its kernels need CUDAExecutionProvider"):
        session(model(), ort_library(), "CPUExecutionProvider")


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_library_exports_two_functions_and_nothing_else() -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", ort_library()], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert names == {"RegisterCustomOps", "qwenforgePluginsVersion"}


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_library_is_linked_to_neither_onnx_runtime_nor_cuda() -> None:
    listed = subprocess.run(["readelf", "-d", ort_library()], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", listed.stdout)
    assert needed and not [name for name in needed if re.match(r"lib(onnxruntime|nv|cuda|cudart)", name)]


@needs_library
def test_official_header_is_used_where_it_is_found(tmp_path: Path) -> None:
    """A header that stands for ONNX Runtime's refuses to be compiled: every source that needs it has to meet it."""
    headers, build = tmp_path / "include", tmp_path / "build"
    configure = ("--preset", "plugins", "-B", build, f"-DONNXRUNTIME_INCLUDE_DIR={headers}")
    without = cmake(*configure)
    assert without.returncode and "there is no onnxruntime_c_api.h" in " ".join(without.stderr.split())
    headers.mkdir()
    (headers / "onnxruntime_c_api.h").write_text("#error the official header was read\n", encoding="utf-8")
    assert cmake(*configure).returncode == 0
    sources = sorted(path.name for path in (PLUGINS / "onnxruntime").glob("*.cpp"))
    objects = [f"plugins/CMakeFiles/qwenforge_ort.dir/onnxruntime/{name}.o" for name in sources]
    compiled = cmake("--build", build, "--", "-k", "0", *objects)
    assert sources and compiled.stdout.count("error: #error the official header was read") == len(sources), (
        compiled.stdout
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_interface_has_onnx_runtimes_layout() -> None:
    """Our declaration, and the official header where ONNXRUNTIME_INCLUDE_DIR in the environment names its folder."""
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{PLUGINS}", str(CPP / "ort_abi_layout.cpp")]
    variants: list[list[str]] = [[]]
    if "ONNXRUNTIME_INCLUDE_DIR" in os.environ:
        variants += [["-DQWENFORGE_OFFICIAL_ONNXRUNTIME_HEADERS", f"-I{os.environ['ONNXRUNTIME_INCLUDE_DIR']}"]]
    for more in variants:
        finished = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
