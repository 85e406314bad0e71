"""``qwenforge doctor``: a full machine, a bare one, and its two output forms."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace

import pytest

from qwenforge.cli.doctor import Capability, assess, assess_cpu_kernels, assess_ort_cuda, assess_tensorrt
from qwenforge.cli.main import main
from qwenforge.engine.tensorrt.gpu import LocalGpu
from qwenforge.packages import Package, survey


@pytest.fixture(scope="module")
def packages() -> tuple[Package, ...]:
    return survey()


def _without(packages: tuple[Package, ...], *missing: str) -> list[Package]:
    return [
        replace(package, version="", problem="not installed") if package.name in missing else package
        for package in packages
    ]


def _named(capabilities: list[Capability], start: str) -> Capability:
    (found,) = (capability for capability in capabilities if capability.name.startswith(start))
    return found


def test_development_environment_can_do_everything_built(packages: tuple[Package, ...]) -> None:
    for capability in assess(packages):
        assert capability.ready, capability


def test_missing_torch_disables_export_only_and_says_what_to_install(packages: tuple[Package, ...]) -> None:
    capabilities = assess(_without(packages, "torch", "transformers"))
    export = _named(capabilities, "export")
    assert not export.ready
    assert export.detail == "torch not installed; transformers not installed"
    assert export.install == "pip install --upgrade 'qwenforge[export]'"
    assert _named(capabilities, "run: target ort-cpu").ready
    assert _named(capabilities, "optimize").ready


def test_missing_onnxruntime_disables_running(packages: tuple[Package, ...]) -> None:
    run = _named(assess(_without(packages, "onnxruntime")), "run: target ort-cpu")
    assert not run.ready
    assert run.install == "pip install --upgrade 'qwenforge'"


def test_cpu_kernels_are_named_with_version_and_instruction_set() -> None:
    found = assess_cpu_kernels()
    assert found.ready and "libqwenforge_cpu.so" in found.detail
    assert found.detail.endswith(("avx512-vnni", "avx2", "baseline"))


def test_installation_without_cpu_kernels_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenforge.engine.cpu_library._PLACES", ())
    monkeypatch.delenv("QWENFORGE_CPU_LIBRARY", raising=False)
    found = assess_cpu_kernels()
    assert not found.ready and "there was no C++ compiler; ONNX Runtime's kernels are used" in found.detail
    assert found.install.startswith("a C++ compiler, then pip install")
    monkeypatch.setenv("QWENFORGE_CPU_LIBRARY", "/nowhere.so")
    assert "no plugin library at /nowhere.so" in assess_cpu_kernels().detail


def test_ort_cuda_without_its_parts_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenforge.engine.ort_library._PLACES", ())
    monkeypatch.delenv("QWENFORGE_ORT_LIBRARY", raising=False)
    run, library = assess_ort_cuda()
    assert run.name == "run: target ort-cuda" and not run.ready and "needs onnxruntime-gpu" in run.detail
    assert library.name.startswith("custom ops") and not library.ready and library.install == "make plugins"


def test_ort_cuda_with_its_parts_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenforge.runtime.backends.require_cuda", lambda: "onnxruntime 1.31.1 on H200 (SM 90)")
    found = _named(assess_ort_cuda(), "run: target ort-cuda")
    assert found.ready and found.detail == "onnxruntime 1.31.1 on H200 (SM 90)"


def test_json_is_one_object_with_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["memory_bytes"] > 0
    assert report["machine"]["processor"]["usable_threads"] >= 1
    assert {"onnxruntime", "torch"} <= {package["name"] for package in report["packages"]}
    assert report["targets"]["ort-cpu"] == ["fp32", "fp16"]


def test_table_names_libraries_and_capabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("processor", "memory", "onnxruntime", "run: target ort-cpu"):
        assert word in text


def test_bare_environment_is_diagnosed_not_crashed_on() -> None:
    script = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from qwenforge.cli.main import main\nsys.exit(main(['doctor', '--json']))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    export = next(c for c in json.loads(finished.stdout)["capabilities"] if c["name"].startswith("export"))
    assert not export["ready"]
    assert "qwenforge[export]" in export["install"]


def test_tensorrt_targets_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr("qwenforge.engine.tensorrt.plugin_library._PLACES", ())
    monkeypatch.delenv("QWENFORGE_PLUGIN_LIBRARY", raising=False)
    full, rtx, library = assess_tensorrt()
    assert not full.ready and "pip install tensorrt" in full.detail
    assert not rtx.ready and "TensorRT for RTX SDK" in rtx.detail
    assert not library.ready and library.install == "make plugins"


def test_installed_tensorrt_without_a_gpu_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tensorrt")
    module.__version__ = "11.4.0.106"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("qwenforge.engine.tensorrt.gpu.local_gpu", lambda: None)
    assert "no NVIDIA GPU is visible" in assess_tensorrt()[0].detail
    gpu = LocalGpu("NVIDIA H200", 90, 1, "13.0")
    monkeypatch.setattr("qwenforge.engine.tensorrt.gpu.local_gpu", lambda: gpu)
    assert assess_tensorrt()[0].ready and "NVIDIA H200 (SM 90)" in assess_tensorrt()[0].detail
