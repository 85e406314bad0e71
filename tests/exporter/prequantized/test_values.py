"""The weights of quantized checkpoints are those of the formats' own software, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qwenforge.exporter.checkpoint import Checkpoint, CheckpointWeight
from qwenforge.exporter.quantized_weights import as_quantized
from qwenforge.exporter.weights import cast, chunks, dims
from support.prequantized_checkpoints import write_quantized
from support.prequantized_reference import reference_weights
from support.prequantized_styles import STYLES

EXAMPLES = Path(__file__).parents[3] / "examples" / "checkpoints"
_DTYPES = {
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float32: ir.DataType.FLOAT,
}


@pytest.mark.parametrize("model", ["tiny-qwen2", "tiny-qwen2-moe"])
@pytest.mark.parametrize("style", STYLES)
def test_dequantized_weights_equal_the_reference_to_the_bit(style: str, model: str, tmp_path: Path) -> None:
    folder = write_quantized(EXAMPLES / model, tmp_path / "quantized", STYLES[style]())
    checkpoint = Checkpoint.open(folder)
    expected = reference_weights(folder)
    quantized = [name for name in checkpoint.names if isinstance(checkpoint.tensor(name), CheckpointWeight)]
    assert sorted(quantized) == sorted(expected)
    assert len(quantized) == len([name for name in Checkpoint.open(EXAMPLES / model).names if "_proj.weight" in name])
    for name, reference in expected.items():
        tensor = checkpoint.tensor(name)
        assert dims(tensor) == tuple(reference.shape)
        # The original software rounds each product to its scales' dtype; ours are exact until they are cast.
        ours = cast(tensor, _DTYPES[reference.dtype]).numpy()
        assert np.array_equal(ours.view(np.uint8), reference.contiguous().view(torch.uint8).numpy()), name


@pytest.mark.parametrize("style", STYLES)
def test_weights_keep_their_codes(style: str, tmp_path: Path) -> None:
    made = STYLES[style]()
    folder = write_quantized(EXAMPLES / "tiny-qwen2", tmp_path / "quantized", made)
    checkpoint = Checkpoint.open(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    found = as_quantized(checkpoint.tensor(name))
    assert found is not None and checkpoint.quantized is not None
    assert found.format == checkpoint.quantized.format.weight_format
    assert dims(found.codes) == (256, 512)
    codes, scales = found.codes.numpy().astype(np.float64), found.scales.numpy().astype(np.float64)
    points = 0.0 if found.zero_points is None else found.zero_points.numpy().astype(np.float64)
    spread = [np.repeat(np.broadcast_to(x, scales.shape), found.group_size, axis=1)[:, :512] for x in (points, scales)]
    expected = (codes - spread[0]) * spread[1]
    np.testing.assert_allclose(checkpoint.tensor(name).numpy(), expected, rtol=1e-6, atol=0)


def test_weights_stream_in_blocks(tmp_path: Path) -> None:
    """Rows are unpacked a block at a time, and the pieces are the whole."""
    folder = write_quantized(EXAMPLES / "tiny-qwen2", tmp_path / "quantized", STYLES["awq-group32"]())
    tensor = Checkpoint.open(folder).tensor("model.layers.0.mlp.gate_proj.weight")
    whole = tensor.numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwenforge.exporter.weights.BLOCK_BYTES", 5 * 4 * 256)  # 5 rows, no multiple of a word's 8
        pieces = list(chunks(tensor))
    assert len(pieces) == -(-512 // 5)
    assert b"".join(pieces) == whole.tobytes()
