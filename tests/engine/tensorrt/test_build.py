"""Engines built from bundles by TensorRT for RTX, behind NVIDIA's own Python bindings, and what is recorded of them."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwenforge import __version__
from qwenforge.bundle import Bundle
from qwenforge.cli.main import main
from qwenforge.errors import BundleError
from qwenforge.manifest import MODEL_NAME
from support.engine_bundles import LENGTH, build, built, bundle
from support.plugin_library import why_missing as why_no_library
from support.rtx_standin import standin
from support.rtx_standin import why_missing as why_no_standin

WHY = why_no_standin() or why_no_library()
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "-")

SCRIPT = Path(__file__).parents[2] / "support" / "rtx_standin" / "build_bundle.py"
H200: list[Any] = ["NVIDIA H200", 90, 141 * 10**9, "13.0"]


def _contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_engine_and_all_that_it_was_built_for_are_in_the_bundle(tmp_path: Path) -> None:
    folder = bundle("rtx moe", tmp_path)
    report = built(folder, "--target", "tensorrt-rtx", "--typical-prompt", "16", "--typical-batch", "2")
    opened = Bundle.open(folder, verify="full")
    record = opened.manifest.engine
    assert record is not None and record.model_dump(mode="json") == report["engine"]
    assert (folder / record.file).stat().st_size == report["engine_bytes"] > 100_000
    assert (record.target, record.module, record.tensorrt) == ("tensorrt-rtx", "tensorrt_rtx", "1.7.1")
    assert (record.device, record.sm, record.driver) == (None, None, None)
    assert (record.plugin_library, record.qwenforge_version) == (__version__, __version__)
    assert record.model_sha256 == opened.manifest.files[MODEL_NAME].sha256
    prefill, decode = record.profiles
    assert prefill.typical["input_ids"] == (2, 16) and prefill.maximum["input_ids"] == (4, LENGTH)
    assert decode.typical["input_ids"] == (2, 1) and decode.maximum["input_ids"] == (4, 1)
    assert prefill.minimum["past_key_values.0.key"][2] == LENGTH, "caches have one capacity"
    assert record.layers > 50 and 10**8 < record.peak_build_bytes < report["memory_bound_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "nothing is left beside it"


def test_same_engine_is_not_built_twice_and_another_replaces_it(tmp_path: Path) -> None:
    folder = bundle("rtx", tmp_path)
    first = built(folder)
    again = built(folder)
    assert first["built"] and not again["built"] and again["engine"] == first["engine"]
    assert built(folder, "--rebuild")["built"]
    other = built(folder, "--max-batch", "2")
    assert other["built"] and other["engine"]["profiles"] != first["engine"]["profiles"]
    assert [path.name for path in folder.glob("*.plan")] == [other["engine"]["file"]]
    Bundle.open(folder, verify="full")


def test_engine_with_weights_as_inputs_holds_none_of_them(tmp_path: Path) -> None:
    folder = bundle("rtx inputs", tmp_path)
    manifest = Bundle.open(folder).manifest
    assert built(folder)["built"]
    shapes = Bundle.open(folder).manifest.engine
    assert shapes is not None and not {spec.name for spec in manifest.weight_inputs} & set(shapes.profiles[0].minimum)


@pytest.mark.parametrize("name", ["h200", "h200 plugin", "orin"])
def test_target_tensorrt_builds_on_its_gpu_and_keeps_timings(name: str, tmp_path: Path) -> None:
    """The GPU is invented and TensorRT for RTX stands behind the module ``tensorrt``: all of it but the kernels."""
    folder = bundle(name, tmp_path)
    gpu = ["Orin", 87, 60 * 10**9, "12.6"] if name == "orin" else H200
    wishes = {"gpu": gpu, "options": {"optimization_level": 2, "workspace_bytes": 1 << 28, "weight_streaming": True}}
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    reports = [_script(folder, wishes, **environment), _script(folder, wishes, **environment)]
    record = reports[0]["engine"]
    assert [report["built"] for report in reports] == [True, False]
    assert (record["module"], record["tensorrt"], record["sm"]) == ("tensorrt", "11.4.0.106", gpu[1])
    assert (record["plugin_library"] is not None) == (name != "h200")
    assert record["options"]["weight_streaming"] is True
    caches = list((tmp_path / "cache" / "qwenforge" / "timing").glob("*.cache"))
    assert len(caches) == 1 and f"sm{gpu[1]}" in caches[0].name and "11.4.0.106" in caches[0].name


def _script(folder: Path, wishes: dict[str, Any], **environment: str) -> dict[str, Any]:
    from support.plugin_library import plugin_library

    environment["QWENFORGE_PLUGIN_LIBRARY"] = str(plugin_library())
    finished = standin().run(SCRIPT, folder, json.dumps(wishes), **environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_build_leaves_the_bundle_as_it_was(how: signal.Signals, tmp_path: Path) -> None:
    folder = bundle("rtx deep", tmp_path)
    before = _contents(folder)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, folder], env=standin().environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"step") and b"parse" not in line:  # the builder is at work
            break
    sent = time.monotonic()
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -how, errors.decode()
    assert time.monotonic() - sent < 10
    if how == signal.SIGINT:
        assert b"KeyboardInterrupt" in errors
    assert _contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert built(folder)["built"]


def test_leftovers_of_dead_builds_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    folder = bundle("rtx", tmp_path)
    dead = tmp_path / ".bundle.engine-999999999-deadbeef"
    alive = tmp_path / ".bundle.engine-1-cafecafe"
    for path in (dead, alive):
        path.write_bytes(b"half an engine")
    assert built(folder)["built"]
    assert not dead.exists() and alive.exists()


def test_full_disk_leaves_the_bundle_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenforge import bundle_update

    folder = bundle("rtx", tmp_path)
    built(folder)
    before = _contents(folder)
    opened = Bundle.open(folder)
    assert opened.manifest.engine is not None
    scratch = bundle_update.scratch_path(folder)
    scratch.write_bytes(b"another engine")

    def full(path: Path, text: str, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BundleError, match=r"cannot write the engine into .*No space left on device.*free space"):
        bundle_update.attach_engine(opened, scratch, opened.manifest.engine)
    monkeypatch.undo()
    assert _contents(folder) == before
    Bundle.open(folder, verify="full")


def test_engine_is_inspected_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bundle("rtx moe", tmp_path)
    file = folder / built(folder)["engine"]["file"]
    assert main(["inspect", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["record"]["module"] == "tensorrt_rtx" and report["layers"] is None
    operators = {item["operator"]: item["count"] for item in report["network"]["operators"]}
    assert operators["QwenForgeMoE"] == 2
    assert any("TensorRT loads an engine on its GPU only" in sentence for sentence in report["unknown"])
    assert main(["inspect", str(file)]) == 0
    text = capsys.readouterr().out
    assert "tensorrt_rtx 1.7.1" in text and "profile prefill" in text and "not known: " in text
    alone = tmp_path / "alone.plan"
    alone.write_bytes(file.read_bytes())
    assert main(["inspect", str(alone)]) == 0
    assert "is in no bundle" in capsys.readouterr().out
    assert main(["inspect", str(folder)]) == 0
    assert "tensorrt_rtx" in capsys.readouterr().out


def test_text_says_what_was_built(tmp_path: Path) -> None:
    folder = bundle("rtx", tmp_path)
    finished = build(folder)
    assert finished.returncode == 0 and finished.stderr == ""
    for words in ("wrote ", "tensorrt_rtx 1.7.1", "of memory", "prefill: up to 4 x 64 tokens", "decode: up to 4 x 1"):
        assert words in finished.stdout
    assert "up to date" in build(folder).stdout
