"""The streamed reference gives transformers' own logits, and holds no weight longer than it is asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qwenforge.engine import reference as reference_module
from qwenforge.engine.reference import Reference
from qwenforge.exporter.checkpoint import Checkpoint
from support.checkpoints import Kind, make_checkpoint
from support.tolerances import FLOAT32_MODEL

LENGTHS = (7, 1, 12)
CASES: list[tuple[Kind, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "dtype": "bfloat16", "shards": 3}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen2_moe", {"layout": "per_expert"}),
    ("qwen2_moe", {"layout": "stacked", "dtype": "float16", "norm_topk_prob": True}),
    ("qwen3", {}),
    ("qwen3_moe", {}),
]


def pretrained(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model: Any, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    return logits


def batch() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Right-padded random tokens, their positions and which are valid, each [3, 12]."""
    tokens = np.random.default_rng(3).integers(0, 320, (len(LENGTHS), max(LENGTHS)))
    positions = np.tile(np.arange(max(LENGTHS)), (len(LENGTHS), 1))
    return tokens, positions, positions < np.array(LENGTHS)[:, None]


def devices(reference: Reference) -> set[str]:
    return {parameter.device.type for parameter in reference._model.parameters()}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("dense"), tokenizer=False))


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize(("kind", "config"), CASES)
def test_logits_are_those_of_from_pretrained(tmp_path: Path, kind: Kind, config: Any, resident: bool) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", kind, tokenizer=False, **config)
    reference, model = Reference(Checkpoint.open(folder), resident=resident), pretrained(folder)
    tokens, positions, valid = batch()
    prefill = reference(tokens, positions, valid)
    lengths = np.array(LENGTHS)
    more = np.random.default_rng(4).integers(0, 320, (len(LENGTHS), 3))
    first = reference(more[:, :1], lengths[:, None], np.ones((3, 1), bool))
    rest = reference(more[:, 1:], lengths[:, None] + [1, 2], np.ones((3, 2), bool))
    for row, length in enumerate(LENGTHS):
        expected = logits_of(model, np.concatenate([tokens[row, :length], more[row]]))
        actual = np.concatenate([prefill[row, :length], first[row], rest[row]])
        np.testing.assert_allclose(actual, expected, atol=FLOAT32_MODEL)


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_index_chooses_the_positions_to_project(dense: Checkpoint, resident: bool) -> None:
    index = np.array([[0, 6], [0, 0], [11, 3]])
    every = Reference(dense, resident=resident)(*batch())
    chosen = Reference(dense, resident=resident)(*batch(), index)
    expected = np.take_along_axis(every, index[:, :, None], axis=1)
    np.testing.assert_allclose(chosen, expected, atol=FLOAT32_MODEL)


def test_vocabulary_projected_in_blocks_is_the_same(dense: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = Reference(dense, resident=False)(*batch())
    monkeypatch.setattr(reference_module, "_HEAD_ROWS", 100)
    np.testing.assert_allclose(Reference(dense, resident=False)(*batch()), at_once, atol=FLOAT32_MODEL)


def test_weights_are_dropped_after_use_unless_resident(dense: Checkpoint) -> None:
    streamed, resident = Reference(dense, resident=False), Reference(dense, resident=True)
    assert devices(streamed) == devices(resident) == {"meta"}, "nothing is read before it is needed"
    streamed(*batch())
    resident(*batch())
    assert devices(streamed) == {"meta"}
    assert devices(resident) == {"cpu"}


def test_streamed_layers_are_in_memory_one_at_a_time(dense: Checkpoint) -> None:
    reference, seen = Reference(dense, resident=False), []

    def look(module: Any, _: Any) -> None:
        loaded = [name for name, value in reference._model.named_parameters() if value.device.type != "meta"]
        seen.append({name.split(".")[2] for name in loaded if name.startswith("model.layers.")})

    for layer in reference._model.model.layers:
        layer.register_forward_pre_hook(look)
    reference(*batch())
    assert seen == [{"0"}, {"1"}]


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("rotary", [True, False], ids=["rotary_too", "weights"])
def test_rounded_weights_and_tables_are_computed_with_in_fp32(
    dense: Checkpoint, dtype: ir.DataType, rotary: bool, resident: bool
) -> None:
    import torch

    half = torch.float16 if dtype == ir.DataType.FLOAT16 else torch.bfloat16
    model = pretrained(dense.folder)
    plain = logits_of(model, batch()[0][2])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(half).float()
    if rotary:
        model.model.rotary_emb.register_forward_hook(lambda _, __, out: tuple(part.to(half).float() for part in out))
    expected = logits_of(model, batch()[0][2])
    rounded = Reference(dense, resident=resident, rounded_to=dtype, rounded_rotary=rotary)
    np.testing.assert_allclose(rounded(*batch())[2], expected, atol=FLOAT32_MODEL)
    assert np.abs(expected - plain).max() > 10 * FLOAT32_MODEL
