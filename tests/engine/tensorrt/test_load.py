"""Loading an engine: the calls to TensorRT in their order, and what is refused. The module is invented."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from qwenforge.bundle import Bundle
from qwenforge.engine.tensorrt.gpu import LocalGpu
from qwenforge.engine.tensorrt.load import load_engine
from qwenforge.errors import UserError
from qwenforge.manifest import EngineRecord, FileRecord
from support.engine_bundles import bundle

H200 = LocalGpu("NVIDIA H200", 90, 141 * 10**9, "13.0")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the invented module ``tensorrt`` was asked for."""
    told: list[str] = []

    class Runtime:
        def __init__(self, logger: Any) -> None:
            told.append("runtime")

        def deserialize_cuda_engine(self, data: bytes) -> str | None:
            told.append(f"deserialize {len(data)}")
            return "engine" if data != b"broken" else None

    class Refitter:
        def __init__(self, engine: str, logger: Any) -> None:
            told.append(f"refitter of {engine}")

        def refit_cuda_engine(self) -> bool:
            told.append("refit engine")
            return True

    class OnnxParserRefitter:
        def __init__(self, refitter: Refitter, logger: Any) -> None:
            pass

        def refit_from_file(self, path: str) -> bool:
            told.append(f"refit from {Path(path).name}")
            return Path(path).is_file()

    module = types.ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)  # others look whether it is installed
    vars(module).update(
        __version__="11.4.0.106",
        ILogger=object,
        Runtime=Runtime,
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
    )
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return told


def _with_engine(folder: Path, data: bytes = b"an engine", **options: bool) -> Bundle:
    opened = Bundle.open(folder)
    (folder / "engine.plan").write_bytes(data)
    record = EngineRecord(
        file="engine.plan",
        target="tensorrt",
        device="h200",
        sm=90,
        module="tensorrt",
        tensorrt="11.4.0.106",
        driver="13.0",
        plugin_library=None,
        layout_version=1,
        model_sha256=opened.manifest.files["model.onnx"].sha256,
        profiles=(),
        options=dict(options),
        layers=1,
        build_seconds=1.0,
        peak_build_bytes=1,
        qwenforge_version="0.1.0",
    )
    file = FileRecord(bytes=len(data), sha256="0" * 64, sampled_sha256="0" * 64)
    files = {**opened.manifest.files, "engine.plan": file}
    return Bundle(folder, opened.manifest.model_copy(update={"engine": record, "files": files}))


def test_engine_is_deserialized(calls: list[str], tmp_path: Path) -> None:
    module, engine = load_engine(_with_engine(bundle("h200", tmp_path)), gpu=lambda: H200)
    assert module.__version__ == "11.4.0.106" and engine == "engine"
    assert calls == ["runtime", "deserialize 9"]


def test_stripped_engine_gets_the_weights_of_the_graph(calls: list[str], tmp_path: Path) -> None:
    load_engine(_with_engine(bundle("h200", tmp_path), strip_weights=True), gpu=lambda: H200)
    assert calls[2:] == ["refitter of engine", "refit from model.onnx", "refit engine"]


def test_engine_that_tensorrt_refuses_is_named(calls: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TensorRT 11\.4\.0\.106 does not load engine\.plan"):
        load_engine(_with_engine(bundle("h200", tmp_path), b"broken"), gpu=lambda: H200)


def test_engine_is_not_loaded_without_a_gpu_or_before_it_is_built(calls: list[str], tmp_path: Path) -> None:
    folder = bundle("h200", tmp_path)
    with pytest.raises(UserError, match="has no engine yet: run qwenforge build"):
        load_engine(Bundle.open(folder), gpu=lambda: H200)
    with pytest.raises(UserError, match="none is visible here"):
        load_engine(_with_engine(folder), gpu=lambda: None)
    assert calls == []
