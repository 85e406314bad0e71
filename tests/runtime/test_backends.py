"""What an ort-cuda bundle needs, or an ort-cpu one of our kernels, refused in one sentence where it is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest

from qwenforge import ort_cuda_choice
from qwenforge.engine.tensorrt.gpu import LocalGpu
from qwenforge.errors import BundleError, UserError
from qwenforge.manifest import OrtCpuRecord
from qwenforge.runtime import backends, load
from qwenforge.runtime.backends import CPU_PROVIDER, CUDA_PROVIDER, cpu_backend, cuda_backend, require_cuda
from support.bundle_builder import write_bundle

OURS = ort_cuda_choice.choose(attention="plugin").record(routed=True)
NATIVE = ort_cuda_choice.choose(attention="native", experts="native").record(routed=True)


def _gpu_build(monkeypatch: pytest.MonkeyPatch, version: str = "1.31.1", gpu: bool = True) -> None:
    """The GPU build of ONNX Runtime, as far as it can be asked without a session."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA_PROVIDER, CPU_PROVIDER])
    monkeypatch.setattr(onnxruntime, "__version__", version)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda **_: print("noise"))
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda _: None)
    monkeypatch.setattr(backends, "local_gpu", lambda: LocalGpu("H200", 90, 1 << 37, "13.0") if gpu else None)


def test_cpu_build_of_onnxruntime_is_refused() -> None:
    message = r"needs onnxruntime-gpu, and the onnxruntime \S+ installed here is the build for the CPU: pip uninstall"
    with pytest.raises(UserError, match=message):
        require_cuda()


def test_old_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_build(monkeypatch, "1.30.2")
    with pytest.raises(UserError, match=r"needs onnxruntime-gpu 1\.31 or newer, and 1\.30\.2 is installed"):
        require_cuda()


def test_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_build(monkeypatch, gpu=False)
    with pytest.raises(UserError, match="no driver or no GPU is visible here; check nvidia-smi"):
        require_cuda()


def test_gpu_and_version_are_told_and_nothing_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _gpu_build(monkeypatch)
    assert require_cuda() == "onnxruntime 1.31.1 on H200 (SM 90)"
    assert capsys.readouterr().out == ""


def test_missing_library_is_refused_and_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_build(monkeypatch)
    monkeypatch.setattr(backends, "DeviceMemory", lambda *_: SimpleNamespace(providers=[CUDA_PROVIDER]))
    monkeypatch.setattr("qwenforge.engine.ort_library._PLACES", ())
    monkeypatch.delenv("QWENFORGE_ORT_LIBRARY", raising=False)
    with pytest.raises(UserError, match=r"libqwenforge_ort\.so, which was not found: build it with 'make plugins'"):
        cuda_backend(OURS)
    assert cuda_backend(NATIVE).library is None
    with pytest.raises(UserError, match="there is no plugin library at /nowhere"):
        cuda_backend(OURS, library=Path("/nowhere"))


def test_cpu_backend_has_the_library_where_the_bundle_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends, "find_cpu_library", lambda path: SimpleNamespace(path=path or Path("/installed.so")))
    ours, theirs = (OrtCpuRecord(kernels=kernels, basis="asked for") for kernels in ("qwenforge", "onnxruntime"))
    assert cpu_backend(ours).library == Path("/installed.so")
    assert cpu_backend(ours, library=tmp_path).library == tmp_path
    assert cpu_backend(theirs).library is None and cpu_backend().library is None


def test_capture_is_asked_for_where_our_op_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_build(monkeypatch)
    monkeypatch.setattr(backends, "DeviceMemory", lambda *_: SimpleNamespace(providers=[CUDA_PROVIDER]))
    found = SimpleNamespace(path=Path("/lib/libqwenforge_ort.so"))
    monkeypatch.setattr(backends, "find_ort_library", lambda _: found)
    for record, captured in ((OURS, True), (NATIVE, False)):
        backend = cuda_backend(record, gpu=1)
        name, options = backend.providers[0]
        assert (name, options["device_id"], options["enable_cuda_graph"]) == (CUDA_PROVIDER, "1", str(int(captured)))
        assert backend.captures_decode == captured and backend.providers[1:] == [CPU_PROVIDER]


def test_provider_that_did_not_load_is_refused_before_the_bundle_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime prints a warning and takes the next provider when CUDA's libraries are missing."""
    _gpu_build(monkeypatch)
    monkeypatch.setattr(backends, "DeviceMemory", lambda *_: SimpleNamespace(providers=[CPU_PROVIDER]))
    with pytest.raises(UserError, match=r"could not load its CUDAExecutionProvider: .*onnxruntime-gpu\[cuda,cudnn\]"):
        cuda_backend(NATIVE)


def test_bundle_is_loaded_for_its_own_target(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", target="ort-cuda", dtype="bf16", ort_cuda=NATIVE)
    with pytest.raises(UserError, match="needs onnxruntime-gpu"):
        load(bundle)
    silent = write_bundle(tmp_path / "silent", target="ort-cuda", dtype="bf16")
    with pytest.raises(BundleError, match="does not say what its ort-cuda graph is made of"):
        load(silent)


def test_negative_gpu_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", target="ort-cuda", dtype="bf16", ort_cuda=NATIVE)
    with pytest.raises(UserError, match="gpu is -1: give the number of a GPU"):
        load(bundle, gpu=-1)
