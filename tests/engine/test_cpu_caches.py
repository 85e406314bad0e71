"""Key/value caches in fp16 with our CPU kernels: the choice, and the runtime on them beside caches in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenforge import load
from qwenforge.bench.rounded_export import Rounding, export_rounded
from qwenforge.bundle import Bundle
from qwenforge.engine import cpu_kernels
from qwenforge.engine.cpu_kernels import choose_kernels
from qwenforge.engine.cpu_library import CpuLibrary
from qwenforge.errors import UnsupportedError
from support.source_tree import ROOT
from support.tolerances import QUANTIZED_MODEL

CHECKPOINT = ROOT / "examples/checkpoints/tiny-qwen2"


@pytest.fixture(name="ours_here")
def _ours_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "cpu_library", lambda: CpuLibrary(Path("/lib.so"), "0", "avx2"))


@pytest.mark.usefixtures("ours_here")
def test_default_is_fp16_with_our_kernels_alone() -> None:
    arguments: dict[str, Any] = {"target": "ort-cpu", "dtype": "fp32", "weight_only": True}
    ours, wide, theirs = (
        choose_kernels(None, **arguments),
        choose_kernels(None, cache="fp32", **arguments),
        choose_kernels("onnxruntime", **arguments),
    )
    assert ours is not None and (ours.kernels, ours.cache) == ("qwenforge", "fp16")
    assert wide is not None and (wide.kernels, wide.cache) == ("qwenforge", "fp32")
    assert theirs is not None and (theirs.kernels, theirs.cache) == ("onnxruntime", "fp32")


@pytest.mark.usefixtures("ours_here")
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"asked": "onnxruntime"}, r", and this export has ONNX Runtime's \(asked for\); leave it out"),
        ({"dtype": "fp16"}, r"ONNX Runtime's \(qwenforge's do not go with --dtype fp16: they compute in fp32\)"),
        ({"weight_only": False}, "otherwise; leave it out"),
        ({"target": "tensorrt"}, "otherwise; leave it out"),
    ],
)
def test_fp32_is_refused_where_it_changes_nothing(changed: Mapping[str, Any], reason: str) -> None:
    arguments = {"asked": None, "target": "ort-cpu", "dtype": "fp32", "weight_only": True, **changed}
    with pytest.raises(UnsupportedError, match=f"--cache fp32 is for qwenforge's CPU kernels, .*{reason}"):
        choose_kernels(cache="fp32", **arguments)


@pytest.fixture(scope="module", name="bundles")
def _bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """With caches in fp16 and in fp32, of the same weights."""
    folder, rounding = tmp_path_factory.mktemp("caches"), Rounding(8, 32, 8, None)
    return (
        export_rounded(CHECKPOINT, folder / "fp16", rounding, optimized_for="latency", kernels="qwenforge"),
        export_rounded(
            CHECKPOINT, folder / "fp32", rounding, optimized_for="latency", kernels="qwenforge", cache="fp32"
        ),
    )


def test_type_is_in_the_manifest_and_in_the_signature(bundles: tuple[Path, Path]) -> None:
    for bundle, cache, dtype in zip(bundles, ("fp16", "fp32"), ("float16", "float32"), strict=True):
        manifest = Bundle.open(bundle).manifest
        assert manifest.ort_cpu is not None and manifest.ort_cpu.cache == cache
        signature = (*manifest.inputs, *manifest.outputs)
        caches = {spec.dtype for spec in signature if spec.name.startswith(("past_key_values.", "present."))}
        assert caches == {dtype}
        session = load(bundle, threads=2).session
        assert session.cache_dtype == np.dtype(dtype)


def test_cache_takes_half_the_memory(bundles: tuple[Path, Path]) -> None:
    half, whole = (load(bundle, threads=2).session.new_cache(batch=3, capacity=64).nbytes for bundle in bundles)
    assert 2 * half == whole


@pytest.mark.parametrize("chunk", [None, 8], ids=["one prefill", "prefill in chunks"])
def test_logits_are_those_of_fp32_caches_but_for_rounding(bundles: tuple[Path, Path], chunk: int | None) -> None:
    tokens = np.random.default_rng(0).integers(3, 300, 100).tolist()
    options = {} if chunk is None else {"prefill_chunk": chunk}
    (half,), (whole,) = (load(bundle, threads=2, **options).logits([tokens]) for bundle in bundles)
    # By 2^-12 at most of a key or a value; that puts a few activations on the other side of an edge of their codes.
    assert 0 < np.linalg.norm(half - whole) < QUANTIZED_MODEL * np.linalg.norm(whole)


def test_rows_of_unequal_lengths_and_copied_rows_generate_what_each_does_alone(bundles: tuple[Path, Path]) -> None:
    """Samples share a prefill, whose caches are copied row by row."""
    model = load(bundles[0], threads=2, prefill_chunk=8)
    random = np.random.default_rng(1)
    prompts = [random.integers(3, 300, length).tolist() for length in (3, 40, 17)]
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    together = [sequence.tokens for sequence in model.generate(prompts, n=2, **options).sequences]
    alone = [model.generate([prompt], **options).sequences[0].tokens for prompt in prompts]
    assert together == [tokens for tokens in alone for _ in range(2)]
