"""What people get wrong on the way to an engine: each gets one sentence that says what to do, and exit code 1."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwenforge.bundle import Bundle
from qwenforge.cli.main import main
from qwenforge.devices import get_device
from qwenforge.engine.tensorrt import build as build_module
from qwenforge.engine.tensorrt.build import build_engine
from qwenforge.engine.tensorrt.compatibility import require_engine
from qwenforge.engine.tensorrt.gpu import LocalGpu
from qwenforge.engine.tensorrt.memory import MemoryNeed, require_memory
from qwenforge.engine.tensorrt.options import BuildOptions
from qwenforge.engine.tensorrt.parser_errors import build_problem, parse_problem
from qwenforge.errors import UserError
from qwenforge.manifest import EngineRecord
from support.checkpoints import make_checkpoint
from support.engine_bundles import bundle

H200 = LocalGpu("NVIDIA H200", 90, 141 * 10**9, "13.0")
A100 = LocalGpu("NVIDIA A100", 80, 80 * 10**9, "13.0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mistakes") / "checkpoint")


def _refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence on stderr of a command that exits 1."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("qwenforge: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "tensorrt"], ["needs --device", "h200", "jetson-thor"]),
        (["--target", "tensorrt", "--device", "h300"], ["unknown device 'h300'", "did you mean"]),
        (["--device", "h200"], ["--device belongs to --target tensorrt"]),
        (
            ["--target", "tensorrt", "--device", "jetson-orin-nano", "--dtype", "fp8"],
            ["jetson-orin-nano (SM 87) has no FP8", "int8"],
        ),
        (["--target", "tensorrt", "--device", "a100", "--dtype", "fp8"], ["a100 (SM 80) has no FP8", "int8", "bf16"]),
        (["--target", "tensorrt", "--device", "h200", "--dtype", "fp32"], ["does not support dtype fp32", "bf16"]),
        (["--target", "tensorrt", "--device", "h200", "--dtype", "fp4"], ["does not support dtype fp4", "bf16"]),
        (["--target", "tensorrt", "--device", "h200", "--tensorrt", "8.6"], ["TensorRT 8.6", "10.3", "11.4"]),
        (["--target", "tensorrt", "--device", "rtx-5090", "--tensorrt", "10.3"], ["TensorRT 10.3", "10.13"]),
        (["--target", "tensorrt", "--device", "jetson-orin-nano", "--tensorrt", "11.4"], ["11.4", "10.3"]),
        (
            ["--target", "tensorrt", "--device", "h200", "--tensorrt", "10.3", "--attention", "native"],
            ["no attention over a cache", "--attention plugin"],
        ),
        (["--target", "tensorrt", "--device", "h200", "--experts", "native"], ["SM 100", "--experts plugin"]),
        (["--target", "tensorrt-rtx", "--device", "h200"], ["does not run on h200", "--target tensorrt", "rtx-4090"]),
        (["--target", "tensorrt-rtx", "--tensorrt", "11.4"], ["--tensorrt belongs to --target tensorrt"]),
        (["--target", "tensorrt-rtx", "--weights", "link"], ["--weights link does not go with"]),
        (["--target", "tensorrt-rtx", "--max-length", "9999"], ["--max-length 9999", "256"]),
    ],
    ids=lambda value: " ".join(value[1:]) if value[0].startswith("--") else "",
)
def test_export_that_cannot_be_is_refused(
    options: list[str], words: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = _refusal(capsys, "export", checkpoint, "-o", tmp_path / "bundle", *options)
    assert all(word in sentence for word in words), sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cpu", [], ["was exported for ort-cpu", "--target tensorrt --device D"]),
        ("rtx", ["--target", "tensorrt"], ["was exported for tensorrt-rtx", "--target tensorrt"]),
        ("rtx", ["--device", "h200"], ["does not run on h200", "--target tensorrt --device h200"]),
        ("rtx", ["--device", "rtx-9090"], ["unknown device 'rtx-9090'"]),
        ("h200", [], ["no NVIDIA GPU is visible here", "h200", "--target tensorrt-rtx"]),
        ("h200", ["--device", "jetson-thor"], ["lowered for h200 (SM 90), not for jetson-thor", "export"]),
        ("rtx", ["--max-length", "65"], ["--max-length 65 is too large", "64"]),
        ("rtx", ["--max-batch", "5"], ["--max-batch 5 is too large", "4"]),
        ("rtx", ["--max-length", "16", "--typical-prompt", "17"], ["--typical-prompt 17 is too large", "16"]),
        ("rtx", ["--typical-batch", "9"], ["--typical-batch 9 is too large", "4"]),
        ("rtx", ["--optimization-level", "7"], ["--optimization-level is 0 to 5, not 7"]),
        ("rtx", ["--strip-weights"], ["only with a GPU", "--weights-as inputs"]),
        ("rtx", ["--hardware-compatible", "ampere+"], ["all its devices already", "leave"]),
        ("rtx", ["--version-compatible", "--hardware-compatible", "same-cc"], ["leave one out"]),
        ("rtx", [], ["needs the Python module tensorrt_rtx", "install the wheel"]),
        ("rtx moe", [], ["needs the plugin library libqwenforge_plugins.so", "make plugins"]),
        ("rtx moe", ["--plugin-library", "nowhere.so"], ["there is no plugin library at", "make plugins"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and value[0].startswith("--") else None,
)
def test_build_that_cannot_be_is_refused(
    name: str,
    options: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = bundle(name, tmp_path)
    monkeypatch.delenv("QWENFORGE_PLUGIN_LIBRARY", raising=False)
    monkeypatch.setattr("qwenforge.engine.tensorrt.plugin_library._PLACES", ())
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    before = sorted(path.name for path in folder.iterdir())
    sentence = _refusal(capsys, "build", folder, *options)
    assert all(word in sentence for word in words), sentence
    assert sorted(path.name for path in folder.iterdir()) == before


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def _changed_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_manifest, ["is not a qwenforge bundle"]),
        (_no_weights, ["model.onnx.data is missing"]),
        (_changed_graph, ["model.onnx", "was changed or damaged"]),
    ],
)
def test_damaged_bundle_is_refused(
    damage: Callable[[Path], None], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundle("rtx", tmp_path)
    damage(folder)
    sentence = _refusal(capsys, "build", folder)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, ["does not load", "make plugins"]),
        ("int unrelated(void) { return 0; }", ["is not qwenforge's plugin library"]),
        ('char const* qwenforgePluginsVersion(void) { return "0.0.9"; }', ["is of version 0.0.9", "make plugins"]),
    ],
    ids=["no library", "somebody else's", "another version"],
)
def test_wrong_plugin_library_is_refused(
    source: str | None, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "library.so"
    if source is None:
        library.write_bytes(b"\x7fELF and then nothing")
    else:
        (tmp_path / "library.c").write_text(source, encoding="utf-8")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "library.c"], check=True)
    sentence = _refusal(capsys, "build", bundle("rtx moe", tmp_path), "--plugin-library", library)
    assert all(word in sentence for word in words), sentence


def test_gpu_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"which is NVIDIA A100 \(SM 80\) here and not h200 \(SM 90\): run this command"
    ):
        build_engine(bundle("h200", tmp_path), gpu=lambda: A100)


def test_older_tensorrt_than_the_graph_was_lowered_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle("h200", tmp_path)
    old = types.ModuleType("tensorrt")
    old.__version__ = "10.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(UserError, match=r"lowered for TensorRT 11\.4 and 10\.3\.0 is installed.*--tensorrt 10\.3"):
        build_engine(folder, gpu=lambda: H200)


def test_too_little_host_memory_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(build_module.describe(), available_bytes=100_000_000)
    monkeypatch.setattr(build_module, "describe", lambda: machine)
    monkeypatch.setattr(build_module, "import_tensorrt", None)
    with pytest.raises(UserError, match=r"takes about 80\d MB of memory and 100 MB are free.*--weights-as inputs"):
        build_engine(bundle("rtx", tmp_path))


def test_too_small_a_device_is_refused_with_the_figures() -> None:
    need = MemoryNeed(host=10**9, weights=15 * 10**9, caches=2 * 10**9, logits=10**8)
    with pytest.raises(UserError, match=r"17\.7 GB on jetson-orin-nano, which has 6\.50 GB .*weights 15\.0 GB, caches"):
        require_memory(need, 10**12, get_device("jetson-orin-nano"), None)
    require_memory(need, 10**12, get_device("h200"), None)


def test_timing_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    from qwenforge.engine.tensorrt import timing_cache

    (tmp_path / "file").write_text("", encoding="utf-8")
    config = types.SimpleNamespace(get_timing_cache=lambda: types.SimpleNamespace())
    with pytest.raises(UserError, match=r"timing cache .*file/cache cannot be written .*--timing-cache none"):
        timing_cache.save(config, tmp_path / "file" / "cache")


@pytest.mark.parametrize("size", ["2X", "0", "-1G", "G"])
def test_size_that_is_none_is_a_usage_error(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["build", "bundle", f"--workspace={size}"])
    assert leaving.value.code == 2 and "--workspace" in capsys.readouterr().err


def _opened(tmp_path: Path, **changes: Any) -> Bundle:
    """A bundle that holds an engine, as far as its manifest goes."""
    opened = Bundle.open(bundle("h200", tmp_path))
    fields: dict[str, Any] = {
        "file": "engine.plan",
        "target": "tensorrt",
        "device": "h200",
        "sm": 90,
        "module": "tensorrt",
        "tensorrt": "11.4.0.106",
        "driver": "13.0",
        "plugin_library": "0.1.0",
        "layout_version": 1,
        "model_sha256": opened.manifest.files["model.onnx"].sha256,
        "profiles": (),
        "options": {},
        "layers": 10,
        "build_seconds": 1.0,
        "peak_build_bytes": 10,
        "qwenforge_version": "0.1.0",
    }
    record = EngineRecord(**{**fields, **changes})
    return Bundle(opened.path, opened.manifest.model_copy(update={"engine": record}))


def test_engine_is_loaded_where_it_was_built_for(tmp_path: Path) -> None:
    assert require_engine(_opened(tmp_path), H200, "11.4.0.106", "0.1.0").sm == 90


@pytest.mark.parametrize(
    ("changes", "gpu", "installed", "library", "words"),
    [
        ({}, A100, "11.4.0.106", "0.1.0", [r"built for h200 \(SM 90\) and this is NVIDIA A100 \(SM 80\)", "--rebuild"]),
        ({}, None, "11.4.0.106", "0.1.0", ["runs on an NVIDIA GPU, and none is visible"]),
        ({}, H200, "11.5.0.1", "0.1.0", [r"built by tensorrt 11\.4\.0\.106 and 11\.5\.0\.1 is installed", "--rebuild"]),
        ({}, H200, "11.4.0.106", "0.2.0", [r"needs the plugin library of version 0\.1\.0 and version 0\.2\.0", "make"]),
        ({}, H200, "11.4.0.106", None, ["there is none here", "make plugins"]),
        (
            {"model_sha256": "0" * 64},
            H200,
            "11.4.0.106",
            "0.1.0",
            ["built from another graph", "--device h200 --rebuild"],
        ),
        (
            {"sm": None, "device": None, "target": "tensorrt-rtx"},
            H200,
            "11.4.0.106",
            "0.1.0",
            ["GPUs of TensorRT for RTX"],
        ),
    ],
)
def test_engine_that_does_not_run_here_is_refused_with_the_command_that_rebuilds(
    changes: dict[str, Any],
    gpu: LocalGpu | None,
    installed: str,
    library: str | None,
    words: list[str],
    tmp_path: Path,
) -> None:
    opened = _opened(tmp_path, **changes)
    with pytest.raises(UserError, match=".*".join(words)):
        require_engine(opened, gpu, installed, library)


@pytest.mark.parametrize(
    ("options", "gpu"), [({"version_compatible": True}, H200), ({"hardware_compatible": "ampere+"}, A100)]
)
def test_compatible_engine_runs_elsewhere(options: dict[str, Any], gpu: LocalGpu, tmp_path: Path) -> None:
    installed = "11.9.0.1" if "version_compatible" in options else "11.4.0.106"
    assert require_engine(_opened(tmp_path, options=options), gpu, installed, "0.1.0")


def test_bundle_without_an_engine_names_the_command_that_builds_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no engine yet: run qwenforge build .*bundle --device h200"):
        require_engine(Bundle.open(bundle("h200", tmp_path)), H200, "11.4.0.106", "0.1.0")


class _Parser:
    """A parser with one error, as TensorRT words it."""

    num_errors = 2

    def __init__(self, node: str, operator: str, text: str) -> None:
        self._error = types.SimpleNamespace(node_name=lambda: node, node_operator=lambda: operator, desc=lambda: text)

    def get_error(self, index: int) -> Any:
        return self._error


@pytest.mark.parametrize(
    ("text", "logged", "words"),
    [
        ("creator && Plugin not found", [], ["Plugin not found", "make plugins"]),
        (
            "Invalid node",
            ["QwenForgeMoE 'x': top_k is 9, above 8"],
            ["top_k is 9", "export the bundle again"],
        ),
        ("No importer registered for op: Swish", [], ["No importer", "export again for the TensorRT version"]),
    ],
)
def test_parser_error_names_node_layer_and_remedy(text: str, logged: list[str], words: list[str]) -> None:
    parser = _Parser("model.layers.7.mlp.experts", "QwenForgeMoE", text)
    sentence = parse_problem(parser, logged, "11.4")
    assert "TensorRT 11.4 does not take node model.layers.7.mlp.experts (QwenForgeMoE) of decoder layer 7" in sentence
    assert "(1 more nodes)" in sentence and all(word in sentence for word in words), sentence


def test_builder_error_is_told_in_one_sentence() -> None:
    sentence = build_problem(["Error Code 2: OutOfMemory in layers.3.mlp"], "11.4")
    assert "of decoder layer 3" in sentence and "--workspace" in sentence


def test_options_are_recorded_as_given() -> None:
    recorded = BuildOptions(weight_streaming=True, workspace_bytes=5).recorded()
    assert recorded["weight_streaming"] is True and recorded["workspace_bytes"] == 5
