"""``bench/kernels.py`` as far as it goes without a GPU: floors, references, options, and what it says is missing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from qwenforge.bench.gpu_clock import Time
from qwenforge.bench.kernel_library import Experts
from qwenforge.bench.kernels import main
from qwenforge.bench.moe_layers import KINDS, LAYERS, Call, Layer, floor_us, reference, unpacked
from qwenforge.plugins.moe.packing import interleave, pack_float8, pack_int4, pack_int8, unpack_int4, unpack_int8
from support.source_tree import ROOT


@pytest.mark.parametrize("script", ["kernels.py", "tune_moe.py"])
def test_without_a_gpu_it_says_so(script: str) -> None:
    command = [sys.executable, ROOT / "bench" / script, "--nvcc", "nvcc"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": ""})
    assert finished.returncode == 1 and finished.stdout == ""
    assert finished.stderr == f"{script}: error: no NVIDIA GPU is visible\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["moe", "--types", "bf16,int3"], "'int3' is not one of bf16, int8, int4-128, int4-64, fp8"),
        (["moe", "--routing", "even"], "'even' is not one of uniform, skewed"),
        (["everything"], "invalid choice: 'everything'"),
    ],
)
def test_wrong_option_is_named(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


# KERNELS' table: an H200's 4.3 TB/s and 790 TFLOP/s; microseconds in bf16, with 8 and with 4 bits.
@pytest.mark.parametrize(
    ("layer", "tokens", "touched", "expected"),
    [
        ("Qwen1.5-MoE-A2.7B", 1, 4, (32.2, 16.1, 8.3)),
        ("Qwen2-57B-A14B", 4096, 64, (4567, 4567, 4567)),
        ("Qwen3-30B-A3B", 512, 128, (281, 141, 72.5)),
    ],
)
def test_floor_is_that_of_bytes_or_operations(
    layer: str, tokens: int, touched: int, expected: tuple[float, ...]
) -> None:
    (found,) = (item for item in LAYERS if item.name == layer)
    for kind, wanted in zip(KINDS[:3], expected, strict=True):
        floor, bound = floor_us(found, kind, tokens, touched + found.shared, 4.3e12, 790e12)
        assert floor == pytest.approx(wanted, rel=0.02)
        assert bound == ("arithmetic" if tokens == 4096 else "memory")


def test_fp8_has_twice_the_rate() -> None:
    layer, (bf16, *_, fp8) = LAYERS[1], KINDS
    assert floor_us(layer, fp8, 4096, 72, 4e12, 8e14)[0] == pytest.approx(
        floor_us(layer, bf16, 4096, 72, 4e12, 8e14)[0] / 2
    )


def test_time_is_the_median_with_its_spread() -> None:
    assert Time.of([float(number) for number in range(20, 0, -1)]) == Time(10.5, 3.0, 19.0)


@pytest.mark.parametrize("weight_type", ["float", "int8", "int4", "fp8"])
def test_reference_computes_the_layer(weight_type: str) -> None:
    """Against float64 from the packing's own inverse, with the rows taken apart in another way."""
    random, layer = np.random.default_rng(0), Layer("tiny", 64, 64, 3, 2, 1, normalize=True)
    gate, up = (random.normal(0, 0.1, (4, 64, 64)).astype(np.float32) for _ in range(2))
    down = random.normal(0, 0.1, (4, 64, 64)).astype(np.float32)
    rows = np.stack([interleave(*pair) for pair in zip(gate, up, strict=True)])
    base: dict[str, Any] = {
        "num_experts": 3,
        "top_k": 2,
        "num_shared": 1,
        "normalize": True,
        "weight_type": weight_type,
    }
    if weight_type == "float":
        experts = Experts(torch.from_numpy(rows), torch.from_numpy(down), **base)
        wide = (rows, down)
    else:
        pack = {"int8": pack_int8, "int4": lambda w: pack_int4(w, 64), "fp8": pack_float8}[weight_type]
        packed = [pack(matrix) for matrix in (rows, down)]
        undo = {"int8": unpack_int8, "int4": unpack_int4, "fp8": lambda d: d.view(ml_dtypes.float8_e4m3fn)}[weight_type]
        wide = tuple(
            undo(data).astype(np.float32) * np.swapaxes(scales.astype(np.float32), 1, 2) for data, scales in packed
        )
        first, second = packed
        experts = Experts(
            torch.from_numpy(first[0]),
            torch.from_numpy(second[0]),
            gate_up_scales=torch.from_numpy(first[1]),
            down_scales=torch.from_numpy(second[1]),
            activation_scales=torch.full((5,), 1e-3) if weight_type == "fp8" else None,
            group_size=64,
            **base,
        )
    assert torch.allclose(unpacked(torch, experts, 2)[0], torch.from_numpy(wide[0][2]))
    hidden, logits = random.normal(0, 0.1, (3, 64)), random.normal(size=(3, 3))
    call = Call(*(torch.from_numpy(value) for value in (hidden, logits, random.normal(size=(3, 1)))), touched=4)
    found = reference(torch, layer, experts, call).double().numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for token in range(3):
        chosen = np.argsort(-probabilities[token])[:2]
        share = {int(e): probabilities[token, e] / probabilities[token, chosen].sum() for e in chosen}
        share[3] = 1 / (1 + np.exp(-float(call.gates[token])))
        expected = np.zeros(64)
        for expert, weight in share.items():
            groups = (wide[0][expert].astype(np.float64) @ hidden[token]).reshape(-1, 2, 8)
            gated, upward = groups[:, 0].ravel(), groups[:, 1].ravel()
            expected += weight * (wide[1][expert].astype(np.float64) @ (gated / (1 + np.exp(-gated)) * upward))
        assert np.abs(found[token] - expected).max() < (0.1 if weight_type == "fp8" else 1e-5) * np.abs(expected).max()
