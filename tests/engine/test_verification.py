"""``verify`` accepts right exports and refuses wrong ones, whole and layer by layer, and says how far off they are."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.engine import verification
from qwenforge.engine.executor import StepExecutor
from qwenforge.engine.prompts import verification_prompts
from qwenforge.engine.verification import NEW_TOKENS, VerificationReport, fits_whole, verify
from qwenforge.errors import VerificationError
from qwenforge.exporter.checkpoint import Checkpoint
from support.checkpoints import make_checkpoint
from support.planted_faults import (
    Fault,
    attribute,
    element,
    nothing,
    plant,
    rope_theta,
    swapped_experts,
    swapped_layers,
)
from support.tolerances import FLOAT32_MODEL

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
HOW = (("ort-cpu", "fp32"), ("portable", "fp32"), ("ort-cpu", "fp16"))
NORMS = ("RMSNormalization", "SkipSimplifiedLayerNormalization")
FAULTS: dict[str, Fault] = {
    "one output projection weight": element("model.layers.0.self_attn.o_proj.weight", 1.0),
    "one packed query weight": element("model.layers.1.self_attn.qkv_proj.weight", -1.0),
    "layers swapped": swapped_layers,
    "rope theta": rope_theta(1e6),
    "attention scale": attribute(("GroupQueryAttention",), "scale", 0.2),
    "epsilon": attribute(NORMS, "epsilon", 1e-5),
    "not a number": element("lm_head.weight", float("nan")),
    "infinity": element("model.layers.0.self_attn.qkv_proj.weight", float("inf")),
}
DENSE = {"one down projection weight": element("model.layers.0.mlp.down_proj.weight", 1.0)}
ROUTED: dict[str, Fault] = {
    "experts swapped": swapped_experts,
    "one expert's weight": element("model.layers.0.mlp.experts.down_proj", 5.0),
    "norm_topk_prob": attribute(("MoE",), "normalize_routing_weights", 1),
    "experts per token": attribute(("MoE",), "k", 1),
}


def compare(export: Any, dtype: str, whole: bool, model: Path | None = None, **options: Any) -> VerificationReport:
    options = {"max_length": 256, "prompts": verification_prompts(None, 320, 128), **options}
    return verify(export.checkpoint, model or export.model, DTYPES[dtype], whole=whole, **options)


def cases(kind: str, dtype: str, *groups: dict[str, Fault]) -> list[Any]:
    return [
        pytest.param(kind, dtype, fault, id=f"{kind}-{dtype}-{name}")
        for group in groups
        for name, fault in group.items()
    ]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by_layer"])
@pytest.mark.parametrize(
    ("kind", "target", "dtype"),
    [
        *((kind, *how) for kind in ("qwen2", "qwen2_moe") for how in HOW),
        ("mixed", "portable", "bf16"),
    ],
)
def test_right_export_is_accepted(exports: Any, kind: str, target: str, dtype: str, whole: bool) -> None:
    report = compare(exports(kind, target, dtype), dtype, whole)
    assert report.method == ("whole-model" if whole else "layer-by-layer")
    assert (report.prompts, report.new_tokens) == (8, NEW_TOKENS)
    assert report.token_disagreements == 0
    assert 0 < report.graph_error < FLOAT32_MODEL
    if dtype == "fp16":
        assert report.max_abs_error > FLOAT32_MODEL, "what the report states is how fp16 itself rounds"
        assert report.bound == pytest.approx(1.6e-1)
        assert 1e-9 < report.mean_kl < 1e-2
    else:
        assert report.max_abs_error == report.graph_error
        assert report.bound == pytest.approx(FLOAT32_MODEL)
        assert (report.strays, report.mean_kl < 1e-9) == (0, True)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by_layer"])
@pytest.mark.parametrize(
    ("kind", "dtype", "fault"),
    [
        *cases("qwen2", "fp32", DENSE, FAULTS),
        *cases("qwen2", "fp16", DENSE, FAULTS),
        *cases("qwen2_moe", "fp32", ROUTED),
        *cases("qwen2_moe", "fp16", ROUTED),
    ],
)
def test_planted_fault_is_refused(
    exports: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: str,
    fault: Fault,
    whole: bool,
) -> None:
    monkeypatch.setattr(verification, "NEW_TOKENS", 8)
    export = exports(kind, "ort-cpu", dtype)
    with pytest.raises(VerificationError) as refusal:
        compare(export, dtype, whole, plant(export.model, tmp_path, fault))
    where = r"at prefill|at decode step \d+|with \d new tokens"
    figures = re.search(
        rf"logits by (\S+) \(bound (\S+), worst (?:{where}); (\d+) of (\d+) positions", f"{refusal.value}"
    )
    if figures is None:
        assert re.search(rf"logits that are not finite \((?:{where})\): ", f"{refusal.value}")
        return
    error, bound, strays, positions = map(float, figures.groups())
    assert error > bound and 0 < strays <= positions


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by_layer"])
def test_copy_without_a_fault_is_accepted(exports: Any, tmp_path: Path, whole: bool) -> None:
    export = exports("qwen2_moe", "ort-cpu", "fp32")
    again = compare(export, "fp32", whole, plant(export.model, tmp_path, nothing))
    assert again.max_abs_error == compare(export, "fp32", whole).max_abs_error


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by_layer"])
def test_epsilon_of_a_bf16_export_is_checked_as_in_fp32(exports: Any, tmp_path: Path, whole: bool) -> None:
    export = exports("mixed", "portable", "bf16")
    wrong = plant(export.model, tmp_path, attribute(("RMSNormalization",), "epsilon", 1e-5))
    with pytest.raises(VerificationError, match=r"bound 2\.0e-04"):
        compare(export, "bf16", whole, wrong)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by_layer"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda logits: logits[..., ::-1].copy(), r"model, computed in fp16, differs from transformers: logits by \d"),
        (lambda logits: logits * np.float32(np.inf), r"model, computed in fp16, or transformers gives logits that are"),
    ],
    ids=["wrong_kernel", "overflow"],
)
def test_fp16_arithmetic_is_checked_as_well(
    exports: Any, monkeypatch: pytest.MonkeyPatch, spoil: Any, message: str, whole: bool
) -> None:
    class Spoiled(StepExecutor):
        def __init__(self, *args: Any, upcast: bool, **options: Any) -> None:
            super().__init__(*args, upcast=upcast, **options)
            self._spoil = (lambda logits: logits) if upcast else spoil

        def __call__(self, *args: Any) -> Any:
            return self._spoil(super().__call__(*args))

    export = exports("qwen2_moe", "ort-cpu", "fp16")
    monkeypatch.setattr(verification, "StepExecutor", Spoiled)
    with np.errstate(invalid="ignore"), pytest.raises(VerificationError, match=message):
        compare(export, "fp16", whole)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by_layer"])
def test_sliding_window_is_seen_beyond_it(tmp_path: Path, exports: Any, whole: bool) -> None:
    """An export without the window that the checkpoint asks for differs only once a row is longer than the window."""
    window = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0}
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "windowed", **window))
    export = SimpleNamespace(checkpoint=checkpoint, model=exports("qwen2", "ort-cpu", "fp32").model)
    with pytest.raises(VerificationError, match="the exported model differs from transformers"):
        compare(export, "fp32", whole)


def test_references_are_the_last_prompt_tokens_logits(exports: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    export = exports("qwen2", "ort-cpu", "fp32")
    model = AutoModelForCausalLM.from_pretrained(export.checkpoint.folder, dtype=torch.float32).eval()
    for whole in (True, False):
        report = compare(export, "fp32", whole)
        assert len(report.references) == 8
        for prompt, logits in report.references:
            with torch.inference_mode():
                expected = model(torch.tensor([prompt])).logits[0, -1].numpy()
            np.testing.assert_allclose(logits, expected, atol=FLOAT32_MODEL)


def test_context_limit_bounds_the_decoded_tokens(exports: Any) -> None:
    export = exports("qwen2", "ort-cpu", "fp32")
    prompts = verification_prompts(None, 320, 8)
    report = compare(export, "fp32", True, max_length=16, prompts=prompts)
    assert report.new_tokens == 4
    assert report.positions == sum(map(len, prompts)) + 8 * 4


def test_progress_is_told_step_by_step(exports: Any) -> None:
    told: list[tuple[str, int, int]] = []
    for whole in (True, False):
        compare(exports("qwen2", "ort-cpu", "fp32"), "fp32", whole, progress=lambda *step: told.append(step))
    assert [step for what, step, _ in told if what == "decoding"] == list(range(NEW_TOKENS))
    assert [what for what, _, _ in told[NEW_TOKENS:]] == [
        "prefill, layer by layer",
        "1 token(s) against the cache",
        "3 token(s) against the cache",
    ]
    assert all(0 <= done < total for _, done, total in told)


@pytest.mark.parametrize("whole", [True, False])
def test_mode_follows_the_size_unless_asked(exports: Any, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    monkeypatch.setattr(verification, "fits_whole", lambda checkpoint, models: whole)
    export = exports("qwen2", "ort-cpu", "fp32")
    report = verify(export.checkpoint, export.model, DTYPES["fp32"], [[1, 2, 3], [4]], max_length=16)
    assert report.method == ("whole-model" if whole else "layer-by-layer")


def test_models_that_fit_in_memory_twice_are_run_whole() -> None:
    def checkpoint(*sizes: int) -> Any:
        return SimpleNamespace(
            names=[str(index) for index in range(len(sizes))],
            tensor=lambda name: SimpleNamespace(size=sizes[int(name)]),
            largest_tensor_bytes=lambda dtype: 4 * max(sizes),
        )

    assert fits_whole(checkpoint(*[1_000_000] * 51))
    assert not fits_whole(checkpoint(*[1_000_000] * 52))
    assert fits_whole(checkpoint(100_000_000))
    assert not fits_whole(checkpoint(*[1_000_000] * 51), 3), "an fp16 model is run in fp32 and in fp16"
