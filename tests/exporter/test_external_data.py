"""Saving models whose initializers are plans."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qwenforge.errors import GraphError, UserError
from qwenforge.exporter.external_data import link_checkpoint_files, load_model, save_model
from qwenforge.exporter.weights import cast, concat, stack, transpose

FLOAT = ir.DataType.FLOAT


def model_returning(tensors: Mapping[str, ir.TensorProtocol]) -> ir.Model:
    """A model whose outputs are its initializers."""
    values = [
        ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
        for name, tensor in tensors.items()
    ]
    nodes = []
    for value in values:
        node = ir.Node("", "Identity", [value])
        node.outputs[0].name = f"{value.name}.out"
        node.outputs[0].dtype, node.outputs[0].shape = value.dtype, value.shape
        nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 21}, name="weights")
    return ir.Model(graph, ir_version=10)


def run(path: Path) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {name.removesuffix(".out"): array for name, array in zip(names, session.run(names, {}), strict=True)}


def external_entries(path: Path) -> dict[str, dict[str, str]]:
    proto = onnx.load(path, load_external_data=False)
    return {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}


@pytest.fixture
def source(tmp_path: Path) -> tuple[np.ndarray, ir.ExternalTensor]:
    """A float32 matrix [160, 128] in a file of a folder of its own."""
    array = np.random.default_rng(0).standard_normal((160, 128), dtype=np.float32)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "w.safetensors").write_bytes(b"header" + array.tobytes())
    return array, ir.ExternalTensor(
        folder / "w.safetensors", 6, array.nbytes, FLOAT, shape=ir.Shape(array.shape), name="w"
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    return folder


def test_saved_model_runs_with_the_plans_values(source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path) -> None:
    _, tensor = source
    plans = {
        "plain": tensor,
        "transposed": transpose(tensor),
        "half": cast(tensor, ir.DataType.FLOAT16),
        "merged": transpose(concat([tensor, tensor], 0)),
        "stacked": stack([tensor, tensor]),
        "small": ir.tensor(np.arange(5, dtype=np.int64)),
        "scalar": ir.tensor(np.array(2.5, dtype=np.float32)),
    }
    model = model_returning(plans)
    report = save_model(model, bundle / "model.onnx")
    onnx.checker.check_model(bundle / "model.onnx")
    for name, result in run(bundle / "model.onnx").items():
        np.testing.assert_array_equal(result, plans[name].numpy())
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in plans.items())
    assert report.initializers == len(plans)
    assert sorted(os.listdir(bundle)) == ["model.onnx", "model.onnx.data"]


def test_report_holds_sizes_and_hashes_of_the_files(source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path) -> None:
    report = save_model(model_returning({"w": transpose(source[1])}), bundle / "model.onnx")
    assert [file.path.name for file in report.files] == ["model.onnx", "model.onnx.data"]
    for file in report.files:
        content = file.path.read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_saving_twice_gives_the_same_bytes(source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path) -> None:
    model = model_returning({"w": transpose(source[1]), "v": cast(source[1], ir.DataType.BFLOAT16)})
    first = save_model(model, bundle / "model.onnx")
    second = save_model(model, bundle / "model.onnx")
    assert first == second


def test_identical_tensors_are_stored_once(source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path) -> None:
    array, tensor = source
    other = array.copy()
    other[-1, -1] += 1  # same size and start, different end
    model = model_returning(
        {
            "plan": transpose(tensor),
            "same plan": transpose(transpose(transpose(tensor))),
            "same bytes": ir.tensor(np.ascontiguousarray(array.T)),
            "near": ir.tensor(array),
            "nearer": ir.tensor(other),
        }
    )
    report = save_model(model, bundle / "model.onnx")
    entries = external_entries(bundle / "model.onnx")
    assert entries["plan"] == entries["same plan"] == entries["same bytes"]
    assert entries["near"]["offset"] != entries["nearer"]["offset"]
    assert report.data is not None and report.data.bytes == 3 * array.nbytes
    assert report.duplicate_bytes == 2 * array.nbytes
    assert hashlib.sha256((bundle / "model.onnx.data").read_bytes()).hexdigest() == report.data.sha256
    np.testing.assert_array_equal(run(bundle / "model.onnx")["nearer"], other)


def test_offsets_are_aligned_and_small_tensors_inline(bundle: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {"tiny": 255, "small": 257, "odd": 1001, "large": 20_000, "last": 300}
    model = model_returning({name: ir.tensor(rng.standard_normal(n, dtype=np.float32)) for name, n in sizes.items()})
    save_model(model, bundle / "model.onnx")
    entries = external_entries(bundle / "model.onnx")
    assert entries.pop("tiny") == {}
    offsets = {name: int(entry["offset"]) for name, entry in entries.items()}
    assert all(offset % 64 == 0 for offset in offsets.values())
    assert offsets["large"] % 4096 == 0
    assert offsets["small"] == 0


def test_progress_counts_to_the_total(source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    model = model_returning({"a": transpose(source[1]), "b": transpose(source[1]), "c": source[1]})
    save_model(model, bundle / "model.onnx", progress=lambda *call: calls.append(call))
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1][:2] == (3 * source[0].nbytes, 3 * source[0].nbytes)
    assert {call[2] for call in calls} == {"a", "b", "c"}


def test_linked_files_are_referenced_in_place(source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path) -> None:
    array, tensor = source
    links = link_checkpoint_files(bundle, [tensor.path])
    model = model_returning({"linked": tensor, "copied": transpose(tensor)})
    report = save_model(model, bundle / "model.onnx", link=links)
    entries = external_entries(bundle / "model.onnx")
    assert entries["linked"] == {"location": "weights/w.safetensors", "offset": "6", "length": str(array.nbytes)}
    assert (report.linked_bytes, report.data and report.data.bytes) == (array.nbytes, array.nbytes)
    assert os.path.samefile(bundle / "weights/w.safetensors", tensor.path)
    results = run(bundle / "model.onnx")
    np.testing.assert_array_equal(results["linked"], array)
    np.testing.assert_array_equal(results["copied"], array.T)
    loaded = load_model(bundle / "model.onnx").graph.initializers
    np.testing.assert_array_equal(loaded["linked"].const_value.numpy(), array)


def test_model_with_everything_linked_has_no_data_file(
    source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path
) -> None:
    links = link_checkpoint_files(bundle, [source[1].path])
    report = save_model(model_returning({"w": source[1]}), bundle / "model.onnx", link=links)
    assert report.data is None
    assert not (bundle / "model.onnx.data").exists()


def test_link_that_the_filesystem_refuses_is_a_clear_error(
    source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match=r"cross-device link; put the bundle on the checkpoint's disk or export with"):
        link_checkpoint_files(bundle, [source[1].path])


def test_replace_makes_the_model_refer_to_the_files(source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path) -> None:
    model = model_returning({"w": transpose(source[1])})
    save_model(model, bundle / "model.onnx", replace=True)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.location == "model.onnx.data"
    np.testing.assert_array_equal(tensor.numpy(), source[0].T)


def test_saving_over_the_data_a_model_reads_is_refused_unless_replaced(
    source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path
) -> None:
    path = bundle / "model.onnx"
    save_model(model_returning({"w": source[1], "v": transpose(source[1])}), path)
    loaded = load_model(path)
    with pytest.raises(GraphError, match="holds initializer 'w' of the model being saved"):
        save_model(loaded, path)
    values = loaded.graph.initializers
    values["w"].const_value = transpose(values["w"].const_value)
    save_model(loaded, path, replace=True)
    np.testing.assert_array_equal(values["w"].const_value.numpy(), source[0].T)
    np.testing.assert_array_equal(run(path)["v"], source[0].T)


def test_failure_leaves_the_old_files_and_no_others(source: tuple[np.ndarray, ir.ExternalTensor], bundle: Path) -> None:
    path = bundle / "model.onnx"
    old = save_model(model_returning({"w": source[1]}), path)
    missing = ir.ExternalTensor(bundle / "gone", 0, 4096, FLOAT, shape=ir.Shape([1024]), name="gone")
    with pytest.raises(UserError, match=r"gone of tensor 'gone' is missing"):
        save_model(model_returning({"w": transpose(source[1]), "x": missing}), path)
    assert sorted(os.listdir(bundle)) == ["model.onnx", "model.onnx.data"]
    assert all(hashlib.sha256(file.path.read_bytes()).hexdigest() == file.sha256 for file in old.files)


def test_unwritable_target_is_a_user_error(source: tuple[np.ndarray, ir.ExternalTensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*absent/model.onnx: No such file"):
        save_model(model_returning({"w": source[1]}), tmp_path / "absent" / "model.onnx")


def test_load_model_refuses_what_is_no_model_and_data_outside(tmp_path: Path, bundle: Path) -> None:
    (bundle / "noise.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(GraphError, match="cannot be read as an ONNX model"):
        load_model(bundle / "noise.onnx")
    (tmp_path / "secret").write_bytes(b"\0" * 4096)
    outside = ir.ExternalTensor("../secret", 0, 4096, FLOAT, shape=ir.Shape([1024]), name="w", base_dir=bundle)
    ir.save(model_returning({"w": outside}), bundle / "model.onnx")
    with pytest.raises(GraphError, match=r"'w' is at '../secret', outside the model's folder"):
        load_model(bundle / "model.onnx")


def test_packed_types_are_copied_byte_for_byte(bundle: Path) -> None:
    packed = ir.Tensor((np.arange(4096) % 16 - 8).astype(np.int8), dtype=ir.DataType.INT4)
    path = bundle / "model.onnx"
    save_model(model_returning({"q": packed}), path)
    loaded = load_model(path)
    save_model(loaded, bundle / "again.onnx")
    np.testing.assert_array_equal(
        load_model(bundle / "again.onnx").graph.initializers["q"].const_value.numpy(), packed.numpy()
    )
