"""Bundles damaged and signed again, hashes and checksum included, are refused by their contents."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from qwenforge.bundle import Bundle
from qwenforge.digests import sampled_sha256
from qwenforge.errors import UserError
from qwenforge.runtime import LanguageModel, load
from support.bundle_builder import edit_manifest, write_bundle
from support.checkpoints import make_checkpoint
from support.ort_models import write_qwen2_bundle

Edit = Callable[[Any], Any]


def sign(bundle: Path, name: str) -> None:
    """Record the size and hashes that the file ``name`` has now."""
    data = (bundle / name).read_bytes()
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    record["sampled_sha256"] = sampled_sha256(bundle / name)
    edit_manifest(bundle, lambda fields: fields["files"].update({name: record}))


def refusal(act: Callable[[], Any]) -> str:
    """The one sentence that ``act`` is refused with."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


MANIFEST: dict[str, tuple[Edit, str]] = {
    "stop token beyond the vocabulary": (lambda m: m.update(eos_token_ids=[1, 40]), "token 40 is not one of the model"),
    "padding beyond the vocabulary": (lambda m: m.update(pad_token_id=10**30), "is not one of the model's 40"),
    "truth for the schema": (lambda m: m.update(schema_version=True), "schema_version is missing or no number"),
    "target of two lines": (lambda m: m.update(target="a\nb"), "target: string should match"),
    "file name of two lines": (
        lambda m: m["files"].update({"a\nb": m["files"]["model.onnx"]}),
        "'a\\nb' is not a plain",
    ),
    "file name without end": (
        lambda m: m["files"].update({"a/" * 3000 + "b": m["files"]["model.onnx"]}),
        "is not a plain relative file name",
    ),
    "field of two lines": (lambda m: m.update({"a\nb": 1}), "the field 'a\\nb' is unknown"),
    "field without end": (lambda m: m.update({"z" * 100_000: 1}), "' is unknown"),
}


@pytest.mark.parametrize("damage", MANIFEST)
def test_signed_manifest_with_impossible_field_is_refused(tmp_path: Path, damage: str) -> None:
    edit, expected = MANIFEST[damage]
    bundle = write_bundle(tmp_path / "bundle")
    edit_manifest(bundle, lambda fields: (edit(fields), fields)[1])
    message = refusal(lambda: Bundle.open(bundle))
    assert message.startswith(str(bundle / "manifest.json")) and expected in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_manifest_of_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    path = write_bundle(tmp_path / "bundle") / "manifest.json"
    path.write_text(path.read_text(), encoding=encoding)
    assert "manifest.json is not valid JSON" in refusal(lambda: Bundle.open(path.parent))


@pytest.mark.parametrize(("name", "expected"), [("a" * 5000, "cannot be reached"), ("a\udcff", "is not valid UTF-8")])
def test_path_that_no_bundle_can_have_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    assert expected in refusal(lambda: Bundle.open(tmp_path / name))


@pytest.mark.parametrize("token", ['"x"', "[[1]]", '{"a": 1}', "1.5", "40", "-1", "true"])
def test_generation_config_with_impossible_stop_token_is_refused(tmp_path: Path, token: str) -> None:
    path = write_bundle(tmp_path / "bundle") / "generation_config.json"
    path.write_text(f'{{"eos_token_id": {token}}}')
    sign(path.parent, path.name)
    bundle = Bundle.open(path.parent)
    message = refusal(lambda: bundle.generation_config)
    assert message.startswith(f"{path}: eos_token_id is no token of the model's 40")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that runs; copy before damaging it."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("whole") / "checkpoint", num_hidden_layers=1)
    return write_qwen2_bundle(checkpoint, checkpoint.parent / "bundle")


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def reshape(name: str, *dims: int | str) -> Edit:
    """State other dimensions for the graph inputs and outputs called ``name`` or ``name.``..."""

    def edit(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output):
            if value.name == name or value.name.startswith(f"{name}."):
                shape = value.type.tensor_type.shape
                del shape.dim[:]
                for dim in dims:
                    shape.dim.add(**{"dim_value" if isinstance(dim, int) else "dim_param": dim})

    return edit


def no_shape(graph: onnx.GraphProto) -> None:
    for value in graph.input:
        if value.name.startswith("past_key_values"):
            value.type.tensor_type.ClearField("shape")


GRAPHS: dict[str, tuple[Edit, str]] = {
    "heads by name": (reshape("past_key_values", "batch", "heads", "capacity", 16), "has the shape"),
    "no heads": (reshape("past_key_values", "batch", 0, "capacity", 16), "has the shape"),
    "cache without shape": (no_shape, "has the shape [], not [batch, heads, capacity, head size]"),
    "batch fixed": (reshape("input_ids", 2, "sequence"), "ONNX Runtime cannot "),
    "tokens of a row": (reshape("input_ids", "sequence"), "ONNX Runtime cannot load the model"),
}


@pytest.mark.parametrize("damage", GRAPHS)
def test_graph_of_another_signature_is_refused(bundle: Path, damage: str) -> None:
    edit, expected = GRAPHS[damage]
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    edit(model.graph)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    sign(bundle, "model.onnx")
    message = refusal(lambda: load(bundle, threads=1).generate([1, 2, 3], max_new_tokens=2))
    assert message.startswith(f"{bundle / 'model.onnx'}: ") and expected in message
    assert message.endswith("export the bundle again")


def test_manifest_of_another_vocabulary_is_refused(bundle: Path) -> None:
    edit_manifest(bundle, lambda fields: fields["model"].update(vocab_size=3200))
    message = refusal(lambda: load(bundle))
    assert message.startswith(str(bundle / "model.onnx"))
    assert "the graph's logits have 320 columns, the manifest says 3200" in message


@pytest.mark.parametrize("options", [{"": "1"}, {"a" * 5000: "1"}, {"a": "1" * 100_000}])
def test_session_option_that_onnx_runtime_refuses_is_an_error_of_the_bundle(bundle: Path, options: Any) -> None:
    edit_manifest(bundle, lambda fields: fields.update(session_options=options))
    assert "ONNX Runtime cannot load the model" in refusal(lambda: load(bundle))


def model_with(bundle: Path, name: str, text: str) -> LanguageModel:
    (bundle / name).write_text(text, encoding="utf-8")
    sign(bundle, name)
    return load(bundle, threads=1)


@pytest.mark.parametrize(
    "model",
    [
        '{"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "nope"}',
        '{"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "nope"}',
    ],
)
def test_tokenizer_that_fails_when_it_is_used_is_named(bundle: Path, model: str) -> None:
    loaded = model_with(bundle, "tokenizer.json", f'{{"version": "1.0", "added_tokens": [], "model": {model}}}')
    message = refusal(lambda: loaded.generate("xyz"))
    assert message.startswith(f"{bundle / 'tokenizer.json'}: the tokenizer cannot encode the text (")


TEMPLATES = {
    "{{ 1 + 'a' }}": "the chat template fails (unsupported operand",
    "{{ 1 / 0 }}": "the chat template fails (division by zero)",
    "{{ range(10**12) | list }}": "the chat template fails (Range too big",
    "{{ 'a' * 10**15 }}": "the chat template fails (MemoryError)",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "the chat template fails (maximum recursion depth",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "the chat template fails (maximum recursion depth",
    "{% include 'x' %}": "the chat template fails (no loader",
    "{{ strftime_now(5) }}": "the chat template fails (strftime",
    "{{ raise_exception | tojson }}": "the chat template fails (Object of type function",
    "{{ raise_exception('two\nlines') }}": "the chat template rejects the messages: two lines",
    "x\n{% for m in %}": "the chat template rejects the messages: Expected an expression",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_template_that_fails_is_refused_in_one_sentence(bundle: Path, template: str) -> None:
    loaded = model_with(bundle, "chat_template.jinja", template)
    message = refusal(lambda: loaded.generate([{"role": "user", "content": "hi"}], max_new_tokens=1))
    assert message.startswith(f"{bundle}: ") and TEMPLATES[template] in message
    assert message.endswith("give the text with --prompt instead")
