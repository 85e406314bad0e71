"""The plugins' contract with TensorRT: every call right and wrong, through two real plugin registries and sanitized.

The checks are written in C++ (tests/cpp/contract.cpp); here they are compiled, run and read.
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest

from support import simt
from support.plugin_library import FOLDER, cuda_folder, plugin_library
from support.plugin_library import why_missing as why_no_library
from support.rtx_standin import standin
from support.rtx_standin import why_missing as why_no_standin
from support.source_tree import ROOT

WHY = why_no_library() or why_no_standin() or simt.why_missing()
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "-")

CPP = ROOT / "tests" / "cpp"
LIBRARIES = {"lean": "libnvinfer_lean.so.11", "rtx": "libtensorrt_rtx.so.1"}
"""TensorRT 11.4's own registry, and that of TensorRT for RTX 1.7."""
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@functools.cache
def _compiled(name: str, folder: Path, *more: str) -> Path:
    """The program made of tests/cpp/``name``.cpp and what ``more`` names."""
    plugin_library()  # it generates the headers
    cuda = cuda_folder()
    assert cuda is not None
    program = folder / f"{name}{len(more)}"
    command = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{ROOT / 'plugins'}"]
    command += [f"-I{CPP}", f"-I{FOLDER / 'plugins' / 'generated'}", "-isystem", str(cuda / "include")]
    command += [str(CPP / f"{name}.cpp"), *more, "-ldl", "-o", str(program)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="module")
def linked(folder: Path) -> Path:
    """The checks with the plugins' sources, kernels emulated, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    plugins = ROOT / "plugins"
    sources = [*plugins.glob("*/*_plugin.cpp"), *plugins.glob("*/*_op.cpp"), CPP / "cuda_stub.cpp"]
    sources.append(plugins / "moe" / "cutlass" / "grouped_missing.cpp")
    sources += [path for path in (plugins / "common").glob("*.cpp") if path.name != "kernels_c_api.cpp"]
    kernels = [*map(str, plugins.glob("moe/*.cu")), *map(str, plugins.glob("attention/*.cu"))]
    flags = ["-DLINKED", "-DQWENFORGE_SIMT", '-DQWENFORGE_VERSION="0"', f"-I{CPP.parent / 'support' / 'simt'}"]
    return _compiled("contract", folder, *flags, "-rdynamic", *SANITIZERS, *map(str, sources), "-x", "c++", *kernels)


def _checks(finished: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of all checks, once they passed."""
    lines = finished.stdout.splitlines()
    failed = [line for line in lines if not line.startswith("ok ")]
    assert not failed, "\n".join(failed)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return lines


def test_every_call_is_answered_as_specified(linked: Path) -> None:
    lines = _checks(subprocess.run([linked, "linked"], capture_output=True, text=True, check=False, timeout=120))
    assert len(lines) > 1900
    for needed in ("enqueue computes every element", "no token is no work", "in memory of its own is an error"):
        assert any(needed in line for line in lines)


@pytest.mark.parametrize("library", LIBRARIES)
def test_plugins_pass_through_a_real_registry(library: str, folder: Path) -> None:
    program = _compiled("contract", folder)
    flavour = "lean" if library == "lean" else "rtx"
    place = standin(flavour)
    finished = subprocess.run(
        [program, "registry", place.libraries / LIBRARIES[library], plugin_library()],
        env=place.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    lines = _checks(finished)
    assert len(lines) > 1900
    for plugin in ("QwenForgeMoE", "QwenForgeAttention"):
        assert f"ok {plugin}: recreated from its own fields" in lines
        assert f"ok {plugin}: version 2 is not found" in lines
        assert f"ok {plugin}: enqueue without a GPU is an error" in lines


@pytest.mark.parametrize("library", LIBRARIES)
def test_refusal_reaches_the_user(library: str) -> None:
    """Through TensorRT's own logger; where a registry has none (lean runtime without a GPU), on stderr."""
    code = f"""
import numpy, tensorrt as trt
class Logger(trt.ILogger):
    def log(self, severity, text):
        print(severity.name, text)
logger = Logger()
runtime = trt.Runtime(logger)
registry = trt.get_plugin_registry()
registry.load_library({str(plugin_library())!r})
field = trt.PluginField("cache_type", numpy.array([1], numpy.int64), trt.PluginFieldType.INT64)
creator = registry.get_creator("QwenForgeAttention", "1", "qwenforge")
print(creator.create_plugin("layer 3", trt.PluginFieldCollection([field]), trt.TensorRTPhase.BUILD))
"""
    finished = standin("lean" if library == "lean" else "rtx").run("-c", code)
    text = "QwenForgeAttention 'layer 3': field cache_type is of type INT64, not INT32"
    assert finished.stdout.splitlines()[-1] == "None", finished.stderr
    assert text in finished.stderr if library == "lean" else f"ERROR {text}" in finished.stdout


@pytest.mark.parametrize("library", LIBRARIES)
def test_official_python_bindings_list_the_creators(library: str) -> None:
    code = f"""
import tensorrt as trt
registry = trt.get_plugin_registry()
registry.load_library({str(plugin_library())!r})
print(sorted((c.name, c.plugin_version, len(c.field_names)) for c in registry.all_creators
             if c.plugin_namespace == "qwenforge"))
"""
    finished = standin("lean" if library == "lean" else "rtx").run("-c", code)
    assert finished.stdout.strip() == "[('QwenForgeAttention', '1', 10), ('QwenForgeMoE', '1', 11)]", finished.stderr


def test_interface_has_tensorrts_layout(folder: Path) -> None:
    finished = subprocess.run([_compiled("abi_layout", folder)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout
