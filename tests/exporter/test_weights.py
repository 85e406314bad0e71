"""The weight plan: what an expression evaluates to, how it simplifies, and that it streams."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwenforge.errors import GraphError, UserError
from qwenforge.exporter import weights
from qwenforge.exporter.transforms import Cast, Concat, Stack, Transpose
from qwenforge.exporter.weights import (
    DerivedTensor,
    cast,
    chunks,
    concat,
    dims,
    interleave_rows,
    leaves,
    plan_key,
    reshape,
    slice_,
    stack,
    substitute,
    transpose,
)

FLOAT, HALF, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
Stored = Callable[..., tuple[np.ndarray, ir.ExternalTensor]]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A function that writes a seeded random array at an odd offset of a file and returns it with its tensor."""
    rng = np.random.default_rng(0)
    count = 0

    def make(*shape: int, dtype: type = ml_dtypes.bfloat16) -> tuple[np.ndarray, ir.ExternalTensor]:
        nonlocal count
        count += 1
        array = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        path = tmp_path / f"{count}.bin"
        path.write_bytes(b"xyz" * count + array.tobytes())
        tensor = ir.ExternalTensor(
            path,
            3 * count,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(shape),
            name=f"tensor {count}",
        )
        return array, tensor

    return make


def assert_same(tensor: ir.TensorProtocol, expected: np.ndarray) -> None:
    assert dims(tensor) == expected.shape
    assert tensor.dtype == ir.DataType.from_numpy(expected.dtype)
    assert tensor.nbytes == expected.nbytes
    raw = np.ascontiguousarray(expected).tobytes()
    assert b"".join(chunks(tensor)) == raw
    assert tensor.tobytes() == raw
    np.testing.assert_array_equal(tensor.numpy(), expected)


@pytest.fixture(params=[None, 64], ids=["one block", "many blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(weights, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_size")
class TestValues:
    def test_every_transform_matches_numpy(self, stored: Stored) -> None:
        a, ta = stored(6, 10)
        b, tb = stored(4, 10)
        c, tc = stored(6, 10)
        assert_same(transpose(ta), a.T)
        assert_same(concat([ta, tb], 0), np.concatenate([a, b]))
        assert_same(concat([ta, tc], -1), np.concatenate([a, c], axis=1))
        assert_same(stack([ta, tc]), np.stack([a, c]))
        assert_same(stack([ta, tc], -1), np.stack([a, c], axis=-1))
        assert_same(cast(ta, FLOAT), a.astype(np.float32))
        assert_same(cast(ta, HALF), a.astype(np.float16))
        assert_same(reshape(ta, (3, 20)), a.reshape(3, 20))
        assert_same(slice_(ta, 1, 2, 7), a[:, 2:7])
        assert_same(interleave_rows(ta), a[[0, 3, 1, 4, 2, 5]])

    def test_merged_projection_of_transposed_casts_matches_numpy(self, stored: Stored) -> None:
        parts = [stored(rows, 12) for rows in (8, 2, 2)]
        merged = concat([transpose(cast(tensor, FLOAT)) for _, tensor in parts], 1)
        assert_same(merged, np.concatenate([array for array, _ in parts]).astype(np.float32).T)

    def test_experts_stacked_transposed_and_interleaved_match_numpy(self, stored: Stored) -> None:
        pairs = [(stored(6, 10), stored(6, 10)) for _ in range(3)]
        array = np.stack([np.concatenate([g, u]) for (g, _), (u, _) in pairs])
        tensor = stack([concat([g, u], 0) for (_, g), (_, u) in pairs])
        order = [row for i in range(6) for row in (i, i + 6)]
        assert_same(interleave_rows(tensor), array[:, order])
        assert_same(
            transpose(interleave_rows(cast(tensor, FLOAT)), (0, 2, 1)),
            array[:, order].astype(np.float32).swapaxes(1, 2),
        )
        assert_same(transpose(tensor, (1, 0, 2)), array.transpose(1, 0, 2))
        assert_same(slice_(tensor, 0, 1, 3), array[1:3])
        assert_same(slice_(tensor, 1, 3, 9), array[:, 3:9])

    def test_slice_across_a_concatenation_matches_numpy(self, stored: Stored) -> None:
        a, ta = stored(6, 4)
        b, tb = stored(5, 4)
        joined, array = concat([ta, tb], 0), np.concatenate([a, b])
        assert_same(slice_(joined, 0, 4, 9), array[4:9])
        assert_same(slice_(joined, 0, 0, 6), a)
        assert_same(slice_(joined, 1, 1, 3), array[:, 1:3])
        assert_same(slice_(transpose(joined), 1, 2, 8), array.T[:, 2:8])
        assert_same(slice_(joined, 0, 5, 5), array[5:5])

    def test_tensors_in_memory_are_leaves_too(self) -> None:
        array = np.arange(24, dtype=np.float32).reshape(4, 6)
        assert_same(transpose(concat([ir.tensor(array), ir.tensor(array)], 0)), np.concatenate([array, array]).T)


def test_cast_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(1).standard_normal(4096, dtype=np.float32)
    values[:4] = [1 + 2**-8, 1 + 3 * 2**-8, 1e-40, -0.0]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(cast(ir.tensor(values), BF16).numpy().view(np.uint16), expected)


def test_cast_beyond_the_range_of_the_target_is_refused_by_name() -> None:
    large = ir.tensor(np.array([1.0, 7e4], dtype=np.float32), name="model.norm.weight")
    with pytest.raises(UserError, match=r"'model.norm.weight' holds values beyond the range of FLOAT16.*bf16 or fp32"):
        cast(large, HALF).numpy()
    infinite = ir.tensor(np.array([1.0, np.inf], dtype=np.float32))
    assert np.isinf(cast(infinite, HALF).numpy()[1])


def test_expressions_simplify(stored: Stored) -> None:
    _, a = stored(6, 10)
    _, b = stored(6, 10)
    assert transpose(a, (0, 1)) is a
    assert transpose(transpose(a)) is a
    assert cast(a, BF16) is a
    assert cast(cast(a, FLOAT), BF16) is a
    assert reshape(reshape(a, (60,)), (6, 10)) is a
    assert concat([a], 0) is a
    assert slice_(a, 0, 0, 6) is a
    merged = transpose(concat([cast(a, FLOAT), cast(b, FLOAT)], 0))
    assert isinstance(merged, DerivedTensor) and merged.transform == Cast(FLOAT)
    (joined,) = merged.sources
    assert isinstance(joined, DerivedTensor) and joined.transform == Concat(1)
    assert all(isinstance(s, DerivedTensor) and s.transform == Transpose((1, 0)) for s in joined.sources)
    experts = transpose(stack([a, b]), (0, 2, 1))
    assert isinstance(experts, DerivedTensor) and experts.transform == Stack(0)


def test_lossy_cast_chain_is_kept(stored: Stored) -> None:
    array, tensor = stored(4, 4, dtype=np.float32)
    assert_same(cast(cast(tensor, BF16), FLOAT), array.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    "build",
    [
        lambda a, b: concat([a, b], 0),
        lambda a, b: stack([a, b]),
        lambda a, b: transpose(a, (0, 0)),
        lambda a, b: reshape(a, (7, 9)),
        lambda a, b: slice_(a, 0, 2, 99),
        lambda a, b: interleave_rows(b),
        lambda a, b: concat([a, ir.tensor(np.zeros((6, 10), np.int64))], 0),
        lambda a, b: stack([]),
    ],
)
def test_sources_that_do_not_fit_are_refused(stored: Stored, build: Callable[..., ir.TensorProtocol]) -> None:
    _, a = stored(6, 10)
    _, b = stored(5, 4)
    with pytest.raises((ValueError, IndexError)):
        build(a, b)


def test_substitute_exchanges_leaves(stored: Stored) -> None:
    _, a = stored(6, 10)
    _, b = stored(6, 10)
    c, tc = stored(6, 10)
    plan = interleave_rows(cast(concat([a, b], 0), FLOAT))
    assert list(leaves(plan)) == [a, b]
    exchanged = substitute(plan, lambda leaf: tc)
    order = [row for i in range(6) for row in (i, i + 6)]
    assert_same(exchanged, np.concatenate([c, c])[order].astype(np.float32))
    assert plan_key(exchanged) == plan_key(interleave_rows(concat([cast(tc, FLOAT), cast(tc, FLOAT)], 0)))
    assert plan_key(exchanged) != plan_key(plan)


def test_mixed_dtypes_are_widened_exactly(stored: Stored) -> None:
    a, ta = stored(6, 10)
    b, tb = stored(6, 10, dtype=np.float32)
    assert_same(concat([ta, tb], 0), np.concatenate([a.astype(np.float32), b]))
    assert_same(stack([tb, ta]), np.stack([b, a.astype(np.float32)]))
    assert_same(substitute(ta, lambda leaf: tb), b.astype(ml_dtypes.bfloat16))
    merged = cast(concat([ta, ta], 0), FLOAT)
    replacements = iter([ta, tb])
    assert_same(substitute(merged, lambda leaf: next(replacements)), np.concatenate([a.astype(np.float32), b]))


def test_streaming_holds_a_few_blocks_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, block = 4096, 1024, 1 << 18
    monkeypatch.setattr(weights, "BLOCK_BYTES", block)
    path = tmp_path / "weights.bin"
    np.zeros((rows, columns), dtype=ml_dtypes.bfloat16).tofile(path)

    def part(index: int) -> ir.TensorProtocol:
        size = rows * columns // 2
        return ir.ExternalTensor(
            path, index * size, size, BF16, shape=ir.Shape([rows // 4, columns]), name=f"part {index}"
        )

    parts = [part(index) for index in range(4)]
    plans = {
        "cast": cast(concat(parts, 0), FLOAT),
        "stack": cast(stack(parts), FLOAT),
        "transpose": cast(transpose(concat(parts, 0)), FLOAT),
        "experts": cast(transpose(interleave_rows(stack(parts)), (0, 2, 1)), FLOAT),
    }
    for name, plan in plans.items():
        tracemalloc.start()
        total = sum(len(chunk) for chunk in chunks(plan))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert total == rows * columns * 4
        # bf16 block, its widened copy and shifts; an interleave may hold one expert (2 MiB here).
        limit = 10 * block + ((rows // 4) * columns * 2 if name == "experts" else 0)
        assert peak < limit, f"{name}: {peak} bytes for {plan.nbytes}"


def test_truncated_file_is_reported_with_tensor_and_range(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\0" * 100)
    tensor = ir.ExternalTensor(path, 64, 64, FLOAT, shape=ir.Shape([4, 4]), name="w")
    for plan in (cast(tensor, HALF), transpose(tensor)):
        with pytest.raises(UserError, match=r"weights.bin ends before tensor 'w' does \(bytes 64 to 128\)"):
            plan.numpy()


def test_location_that_leaves_the_models_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 64)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    for location in ("../secret", "link"):
        tensor = ir.ExternalTensor(location, 0, 64, FLOAT, shape=ir.Shape([4, 4]), name="w", base_dir=folder)
        for plan in (cast(tensor, HALF), transpose(tensor)):
            with pytest.raises(GraphError, match="outside the model's folder"):
                plan.numpy()
