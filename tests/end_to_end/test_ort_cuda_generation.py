"""ort-cuda bundles that generate: real ONNX Runtime on the CPU, the kernels of our custom ops emulated.

The bundle is what an export writes for a GPU, in fp16, which ONNX Runtime's CPU kernels have too; the runtime takes the
GPU's path with the CPU in its place. The example checkpoint is trained, so that rounding does not choose its tokens.
"""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from qwenforge import lowering_choice
from qwenforge.engine.export import export_checkpoint
from qwenforge.runtime import GenerationResult, LanguageModel, load
from qwenforge.runtime import language_model as module
from qwenforge.runtime.backends import CPU_PROVIDER, Backend
from qwenforge.runtime.memory import CPU, DeviceMemory
from support import simt
from support.ort_custom_op import emulated_library
from support.source_tree import ROOT

pytestmark = pytest.mark.skipif(bool(simt.why_missing()), reason=simt.why_missing() or "-")

CHECKPOINT = ROOT / "examples" / "checkpoints" / "tiny-qwen2-moe"
PROMPTS = ["Return a copy of the string", "Raise", "What does len do? It returns the number of items"]
NEW_TOKENS = 12
LOGITS = 0.05
"""Two fp16 models of three layers with logits up to 15: 8e-3 is seen."""
_FOLDER = TemporaryDirectory()


@functools.cache
def _bundle(target: str, **wishes: Any) -> Path:
    path = Path(_FOLDER.name) / "-".join([target, *wishes.values()])
    choice = lowering_choice.choose(target, **wishes)
    export_checkpoint(CHECKPOINT, path, target=target, dtype="fp16", max_length=128, choice=choice, verify_result=False)
    return path


def _on_standin(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    backend = Backend(
        name="the stand-in for a GPU",
        providers=[CPU_PROVIDER],
        memory=DeviceMemory(CPU, 0, [CPU_PROVIDER]),
        cache_types=("tensor(float16)",),
        other_dtype="bf16",
        library=emulated_library(),
    )
    monkeypatch.setattr(module, "_backend", lambda *_: backend)
    model = load(bundle, threads=2, prefill_chunk=8)
    monkeypatch.undo()
    return model


def _generate(model: LanguageModel) -> GenerationResult:
    return model.generate(PROMPTS, max_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_bundle_with_our_ops_generates_the_tokens_of_ort_cpu(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of unequal lengths, one prompt in chunks, caches in place, rows that end early."""
    expected = load(_bundle("ort-cpu"), threads=2)
    found = _on_standin(_bundle("ort-cuda", attention=attention, experts="plugin"), monkeypatch)
    assert _generate(found).tokens == _generate(expected).tokens
    tokens = expected.tokenizer.encode(PROMPTS[2])
    (ours,), (theirs,) = found.logits([tokens]), expected.logits([tokens])
    assert np.abs(ours - theirs).max() < LOGITS
