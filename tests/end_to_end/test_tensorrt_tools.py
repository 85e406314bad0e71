"""NVIDIA's own tools on a TensorRT bundle: polygraphy reads and cleans the graph, and takes the README's lines."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from qwenforge.bundle import Bundle
from qwenforge.cli.main import main
from qwenforge.manifest import MODEL_NAME, README
from support.checkpoints import make_checkpoint
from support.plugin_library import plugin_library
from support.plugin_library import why_missing as why_no_library
from support.rtx_standin import standin
from support.rtx_standin import why_missing as why_no_standin

BUNDLES: dict[str, list[str]] = {
    "native": ["--target", "tensorrt", "--device", "h200"],
    "plugin": ["--target", "tensorrt", "--device", "jetson-orin-nano", "--tensorrt", "10.3", "--dtype", "fp16"],
    "rtx, weights as inputs": ["--target", "tensorrt-rtx", "--weights-as", "inputs"],
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tools")
    checkpoint = make_checkpoint(folder / "checkpoint", "qwen2_moe", dtype="bfloat16")
    made: dict[str, Path] = {}
    for name, options in BUNDLES.items():
        made[name] = folder / re.sub(r"\W+", "-", name)
        options = ["--max-length", "96", "--max-batch", "3", "--no-verify", *options]
        assert main(["export", str(checkpoint), "-o", str(made[name]), *options]) == 0
    return made


def _polygraphy(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("polygraphy")), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def _lines(bundle: Path, program: str) -> list[str]:
    """The arguments of the README's command of ``program``."""
    text = (bundle / README).read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```\n(.*?)```", text, re.S) if block.startswith(program)]
    assert len(blocks) == 1
    return shlex.split(blocks[0].replace("\\\n", " "))[1:]


@pytest.mark.parametrize("name", BUNDLES)
def test_polygraphy_inspects_the_graph(name: str, bundles: dict[str, Path]) -> None:
    finished = _polygraphy("inspect", "model", MODEL_NAME, "--show", "layers", cwd=bundles[name])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "QwenForgeMoE" in finished.stdout and "input_ids" in finished.stdout


@pytest.mark.parametrize("name", BUNDLES)
def test_polygraphy_sanitizes_the_graph_and_loses_no_operator(
    name: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(bundles[name], tmp_path / "copy")
    finished = _polygraphy("surgeon", "sanitize", MODEL_NAME, "-o", "sanitized.onnx", cwd=copy)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    before, after = (Counter(_operators(copy / file)) for file in (MODEL_NAME, "sanitized.onnx"))
    for operator in ("QwenForgeMoE", "QwenForgeAttention", "TRT_Attention", "TensorScatter", "MatMul"):
        assert after[operator] == before[operator]


def _operators(path: Path) -> list[str]:
    return [node.op_type for node in ir.load(path).graph]


@pytest.mark.parametrize("name", ["native", "plugin"])
def test_polygraphy_takes_the_line_in_the_readme(name: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    """It writes the script that it would run: names of options and shapes are right, only the GPU is missing."""
    script = tmp_path / "run.py"
    finished = _polygraphy(*_lines(bundles[name], "polygraphy run"), "--gen-script", script, cwd=bundles[name])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    text = script.read_text(encoding="utf-8")
    assert text.count("Profile()") == 2 and "cache_position': (0, 0)" in text
    assert ("ALIASED_PLUGIN_IO_10_03" in text) == (name == "plugin")
    assert "polygraphy_network.py" in text and (bundles[name] / "polygraphy_network.py").is_file()


@pytest.mark.skipif(bool(why_no_standin() or why_no_library()), reason=why_no_standin() or why_no_library() or "-")
@pytest.mark.parametrize("name", BUNDLES)
def test_polygraphys_network_script_finds_the_plugins(name: str, bundles: dict[str, Path]) -> None:
    code = "import polygraphy_network as n; print(n.load_network()[1].num_layers > 10)"
    environment = standin().environment(QWENFORGE_PLUGIN_LIBRARY=str(plugin_library()))
    command = [sys.executable, "-c", code]
    finished = subprocess.run(
        command, cwd=bundles[name], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert finished.stdout.strip().endswith("True"), finished.stdout + finished.stderr


@pytest.mark.parametrize("name", BUNDLES)
def test_trtexec_line_names_every_dynamic_input_within_the_limits(name: str, bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles[name])
    rtx = name.startswith("rtx")
    options = _options(_lines(bundles[name], "tensorrt_rtx" if rtx else "trtexec"))
    assert options["onnx"] == [MODEL_NAME] and options["dynamicPlugins"] == ["libqwenforge_plugins.so"]
    assert ("stronglyTyped" in options) == (name == "plugin"), "TensorRT 11 and RTX know no other network"
    assert ("preview" in options) == (name == "plugin")
    assert options["profile"] == ["0", "1"]
    least, typical, most = ([_shapes(value) for value in options[f"{kind}Shapes"]] for kind in ("min", "opt", "max"))
    bound = {spec.name for spec in bundle.manifest.weight_inputs}
    assert bool(bound) == rtx
    dynamic = {spec.name: spec.shape for spec in bundle.manifest.inputs if spec.name not in bound}
    for low, middle, high, longest in zip(least, typical, most, (96, 1), strict=True):
        assert set(low) == set(middle) == set(high) == set(dynamic)
        for tensor, shape in dynamic.items():
            assert len(shape) == len(low[tensor])
            triples = list(zip(low[tensor], middle[tensor], high[tensor], strict=True))
            assert all(a <= b <= c for a, b, c in triples)
            fixed = [(dim, triple) for dim, triple in zip(shape, triples, strict=True) if isinstance(dim, int)]
            assert all(triple == (dim, dim, dim) for dim, triple in fixed)
        assert high["input_ids"] == (3, longest)


def _options(arguments: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        found.setdefault(name, []).append(value)
    return found


def _shapes(value: str) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(int(size) for size in sizes.split("x"))
        for name, _, sizes in (part.partition(":") for part in value.split(","))
    }
