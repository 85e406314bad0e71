"""A quantized export keeps its budget, or leaves no bundle and says which layers are to blame."""

from __future__ import annotations

import base64
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwenforge import load
from qwenforge.bundle import Bundle
from qwenforge.calibration import recipes
from qwenforge.calibration.heldout import load_heldout
from qwenforge.devices import get_device
from qwenforge.engine import quantized_export
from qwenforge.engine.export import ExportReport, export_checkpoint
from qwenforge.engine.quantization_request import quantization_request, require_device
from qwenforge.errors import AccuracyError, BundleError, UnsupportedError, UserError
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.graph_passes.quantize.plan import QuantizationPlan
from qwenforge.lowering_choice import choose
from support.rtn_plan import scale_wrongly
from support.source_tree import ROOT
from support.tolerances import QUANTIZED_MODEL
from support.trained_models import logits

CHECKPOINTS = ROOT / "examples/checkpoints"


def listed(folder: Path) -> list[str]:
    """What lies in ``folder``, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def quantized(output: Path, recipe: str = "int8-weight-only", name: str = "tiny-qwen2", **options: Any) -> ExportReport:
    target = options.pop("target", "ort-cpu")
    return export_checkpoint(
        CHECKPOINTS / name,
        output,
        target=target,
        verify_result=False,
        quantization=quantization_request(recipe, **options),
    )


def spoil_scales(monkeypatch: pytest.MonkeyPatch, prefix: str, factor: float, *, weight: str | None = None) -> None:
    """Make calibration give weight scales ``factor`` times too large for the sites that begin with ``prefix``."""
    calibrate = quantized_export.calibrate

    def spoiled(model: ir.Model, recipe: Any, *arguments: Any, **options: Any) -> Any:
        result = calibrate(model, recipe, *arguments, **options)
        if weight is not None and recipe.weight != weight:
            return result
        tensors = {
            name: ir.tensor(np.float32(factor) * tensor.numpy(), name=name)
            if name.startswith(prefix) and name.endswith("_scales")
            else tensor
            for name, tensor in result.plan.tensors.items()
        }
        plan = QuantizationPlan(
            result.plan.recipe, result.plan.sites, result.plan.caches, result.plan.smoothed, tensors
        )
        return replace(result, plan=plan)

    monkeypatch.setattr(quantized_export, "calibrate", spoiled)


def corrupt_scales(monkeypatch: pytest.MonkeyPatch, site_name: str, factor: float) -> None:
    """Let every quantized model hold the codes of ``site_name`` beside scales ``factor`` times too large."""
    apply_plan = quantized_export.apply_plan

    def corrupted(model: ir.Model, plan: QuantizationPlan) -> None:
        apply_plan(model, plan)
        scale_wrongly(model, site_name, factor)

    monkeypatch.setattr(quantized_export, "apply_plan", corrupted)


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects images."""

    _VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: dict[str, str] = {}
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for key in ("src", "href") if (value := found.get(key)) is not None]
        if tag == "img":
            self.images[str(found["alt"])] = str(found["src"])
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert all(link.startswith("data:") for link in page.links)  # nothing is fetched
    return page


def svg(source: str) -> ElementTree.Element:
    head, _, data = source.partition(",")
    assert head == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(data))


def drawn(picture: ElementTree.Element) -> str:
    """All text of an SVG document."""
    return " ".join("".join(element.itertext()) for element in picture.iter("{http://www.w3.org/2000/svg}text"))


@pytest.fixture(scope="module")
def int8_report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """The dense checkpoint at int8, not to be changed; its bundle is alone in its folder."""
    return quantized(tmp_path_factory.mktemp("int8") / "bundle")


def test_export_within_its_budget_records_what_was_measured(int8_report: ExportReport) -> None:
    report = int8_report
    bundle = Bundle.open(report.bundle, verify="full")
    record = bundle.manifest.quantization
    assert record is not None and report.quantization is not None
    assert record.recipe == "int8-weight-only" and record.calibrated_on is None
    assert {group.weight: group.sites for group in record.sites} == {"int8": 18, "kept": 1}
    assert record.accuracy["mean_kl"] == report.quantization.run.distributions.mean_kl <= record.budget["kl"]
    said = bundle.read_json("accuracy.json")["quantization"]
    assert said == json.loads(json.dumps(report.quantization.to_json()))
    assert said["missed"] == [] and said["accuracy"]["positions"] == 16 * 256
    assert [layer["name"] for layer in said["layers"]] == [f"model.layers.{index}" for index in range(3)]
    assert all(35 < layer["own_sqnr_db"] < 60 and layer["own_cosine"] > 0.999 for layer in said["layers"])
    assert said["bytes"]["quantized"] < 0.6 * said["bytes"]["unquantized"]
    assert listed(report.bundle.parent) == ["bundle"]  # the work folder is gone


def test_unquantized_side_of_the_comparison_is_the_checkpoint_in_transformers(int8_report: ExportReport) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    report = int8_report
    assert report.quantization is not None
    source = Checkpoint.open(CHECKPOINTS / "tiny-qwen2")
    text = load_heldout(None, source.tokenizer_files, vocab_size=2048, max_length=2048)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for window in torch.from_numpy(text.windows):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    expected = torch.cat(losses).mean().exp().item()
    assert report.quantization.run.distributions.reference_perplexity == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def sparse_report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """The checkpoint with experts at int8-w8a8, not to be changed."""
    folder = tmp_path_factory.mktemp("sparse")
    return quantized(folder / "bundle", "int8-w8a8", "tiny-qwen2-moe", calibration_rows=4)


def test_page_in_the_bundle_is_whole_and_has_its_plots(sparse_report: ExportReport) -> None:
    report = sparse_report
    page = read_page((report.bundle / "accuracy.html").read_text())
    assert "Within its budget" in page.text and "int8-w8a8" in page.text
    pictures = {title: svg(source) for title, source in page.images.items()}
    assert list(pictures) == [
        "Error of each layer",
        "Divergence of next-token distributions",
        "Expert coverage in calibration",
        "Size of the weights",
    ]
    assert "SQNR" in drawn(pictures["Error of each layer"])
    assert "floor, 32 tokens" in drawn(pictures["Expert coverage in calibration"])
    assert "MB" in drawn(pictures["Size of the weights"])
    assert report.quantization is not None and len(report.quantization.coverage) == 3
    assert all(len(counts) == 16 for counts in report.quantization.coverage.values())


@pytest.mark.parametrize("layer", [0, 2])
def test_one_layer_with_wrong_scales_is_refused_and_named_first(
    layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt_scales(monkeypatch, f"model.layers.{layer}.mlp.down_proj", 4.0)
    with pytest.raises(AccuracyError) as refusal:
        quantized(tmp_path / "bundle")
    message = str(refusal.value)
    worst = message.partition("the worst layers are ")[2].split(", ")
    assert worst[0].startswith(f"model.layers.{layer} (SQNR ")
    assert worst[1].startswith("model.layers.") and worst[2].startswith("model.layers.")
    assert "mean KL is" in message and f"--override 'model.layers.{layer}.*=keep'" in message
    assert listed(tmp_path) == [".bundle.quantization", "bundle.accuracy.html", "bundle.accuracy.json"]
    assert str(tmp_path / "bundle.accuracy.html") in message and str(tmp_path / ".bundle.quantization") in message
    said = json.loads((tmp_path / "bundle.accuracy.json").read_text())
    assert said["missed"] and said["worst_layers"][0] == f"model.layers.{layer}"
    assert "Misses its budget: no bundle was written" in read_page((tmp_path / "bundle.accuracy.html").read_text()).text
    # Mended, the same command takes the calibration up and succeeds, and what was said of the failure goes.
    monkeypatch.undo()
    assert quantized(tmp_path / "bundle").bundle == tmp_path / "bundle"
    assert listed(tmp_path) == ["bundle"]


def test_report_of_an_earlier_refusal_goes_with_the_next_success_and_no_other_file(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError):
        quantized(tmp_path / "bundle", budget="top1=1", work_folder=tmp_path / "work")
    (tmp_path / "bundle.accuracy.txt").write_text("somebody's")
    (tmp_path / "other.accuracy.json").write_text("{}")
    export_checkpoint(CHECKPOINTS / "tiny-qwen2", tmp_path / "bundle", verify_result=False)
    assert listed(tmp_path) == ["bundle", "bundle.accuracy.txt", "other.accuracy.json", "work"]


@pytest.mark.parametrize("name", ["bundle.accuracy.html", "bundle.accuracy.json"])
def test_file_of_somebody_else_in_the_place_of_the_report_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=rf"{name} is in the way of the report"):
        quantized(tmp_path / "bundle")
    assert listed(tmp_path) == [name] and (tmp_path / name).read_text() == '{"mine": 1}'
    export_checkpoint(CHECKPOINTS / "tiny-qwen2", tmp_path / "bundle", verify_result=False)
    assert listed(tmp_path) == ["bundle", name]


def test_an_older_bundle_stays_when_the_budget_is_missed(tmp_path: Path) -> None:
    before = quantized(tmp_path / "bundle").bundle
    manifest = (before / "manifest.json").read_bytes()
    with pytest.raises(AccuracyError, match="the best token agrees at"):
        quantized(tmp_path / "bundle", budget="top1=1")
    assert (before / "manifest.json").read_bytes() == manifest
    Bundle.open(before, verify="full")


def test_work_folder_of_the_user_is_kept_and_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    quantized(tmp_path / "bundle", work_folder=work)
    assert (work / "unquantized" / "model.onnx").is_file()

    def not_again(*_: Any, **__: Any) -> None:
        raise AssertionError("the unquantized model is written again")

    monkeypatch.setattr(quantized_export, "save_model", not_again)
    quantized(tmp_path / "again", work_folder=work)
    assert listed(tmp_path) == ["again", "bundle", "work"]


def test_search_finds_the_layer_that_was_spoilt_and_holds_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_scales(monkeypatch, "model.layers.1.mlp", 8.0, weight="int4")
    options: dict[str, Any] = {"budget": "kl=0.04,ppl=1.06,top1=0.8", "auto": True, "calibration_rows": 4}
    first, second = (quantized(tmp_path / name, "int4-weight-only", **options) for name in ("first", "second"))
    assert first.quantization is not None and second.quantization is not None
    frontier = first.quantization.frontier
    assert frontier is not None
    assert frontier.choice == {"model.layers.1.mlp": "int8"}
    alone = {each.group: each.mean_kl for each in frontier.sensitivities if each.level == "recipe"}
    assert max(alone, key=lambda group: alone[group]) == "model.layers.1.mlp"
    assert first.quantization.recipe.overrides[-1].pattern == "model.layers.1.mlp.*"
    assert first.quantization.missed == []
    assert frontier.to_json() == second.quantization.frontier.to_json()  # type: ignore[union-attr]
    # Chosen on one half of the windows, judged on the other.
    assert first.quantization.run.windows == 8
    page = read_page((first.bundle / "accuracy.html").read_text())
    assert "chosen" in drawn(svg(page.images["Size and accuracy of the choices weighed"]))
    assert "Choices weighed by --auto" in page.text


@pytest.mark.parametrize("recipe", ["int8-w8a8", "int4-weight-only"])
def test_portable_bundle_runs_as_its_graph_is_written_and_as_it_was_judged(tmp_path: Path, recipe: str) -> None:
    report = quantized(tmp_path / "bundle", recipe, target="portable", calibration_rows=4)
    assert report.quantization is not None and list(report.quantization.run.graphs) == ["model.onnx"]
    assert Bundle.open(report.bundle).manifest.session_options == {"session.disable_quant_qdq": "1"}
    source = Checkpoint.open(CHECKPOINTS / "tiny-qwen2")
    text = load_heldout(None, source.tokenizer_files, vocab_size=2048, max_length=2048)
    model = load(report.bundle)
    losses = -np.concatenate([model.score(window.tolist()) for window in text.windows])
    assert np.exp(losses.mean()) == pytest.approx(report.quantization.run.distributions.perplexity, rel=1e-6)
    (found,) = model.logits([text.windows[0].tolist()])
    unfused = logits(ir.load(report.bundle / "model.onnx"), text.windows[:1])
    assert np.linalg.norm(found - unfused) < QUANTIZED_MODEL * np.linalg.norm(unfused)


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_portable_bundle_with_an_8_bit_cache_is_judged_and_not_run(tmp_path: Path, cache: Any) -> None:
    report = quantized(tmp_path / "bundle", target="portable", cache=cache, calibration_rows=4)
    assert report.quantization is not None and 0 < report.quantization.run.distributions.mean_kl < 0.02
    with pytest.raises(BundleError, match=r"runs float or float16; export without --cache"):
        load(report.bundle)


def test_both_graphs_of_an_ort_cpu_bundle_are_judged(sparse_report: ExportReport) -> None:
    report = sparse_report
    assert report.quantization is not None
    graphs = report.quantization.run.graphs
    assert list(graphs) == ["model.onnx", "prefill.onnx"]
    assert report.quantization.run.distributions.mean_kl == max(each.mean_kl for each in graphs.values())


def test_quantized_products_cannot_be_inputs_of_an_engine(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"--weights-as inputs is for weights in 16 bits and for packed experts"):
        export_checkpoint(
            CHECKPOINTS / "tiny-qwen2",
            tmp_path / "bundle",
            target="tensorrt",
            choice=choose("tensorrt", device="h100", weights_as="inputs"),
            quantization=quantization_request("int8-weight-only"),
        )
    assert listed(tmp_path) == []


def test_quantized_experts_are_inputs_of_an_engine_and_judged_as_such(tmp_path: Path) -> None:
    report = export_checkpoint(
        CHECKPOINTS / "tiny-qwen2-moe",
        tmp_path / "bundle",
        target="tensorrt",
        choice=choose("tensorrt", device="h100", weights_as="inputs"),
        verify_result=False,
        quantization=quantization_request("int8-weight-only"),
    )
    inputs = {spec.name: spec.dtype for spec in Bundle.open(report.bundle).manifest.weight_inputs}
    for layer in range(3):
        for matrix in ("gate_up_proj", "down_proj"):
            assert inputs[f"model.layers.{layer}.mlp.experts.{matrix}.packed"] == "int8"
    assert not any("self_attn" in name for name in inputs)  # codes stay, TensorRT wants them when it builds
    assert report.quantization is not None and 0 < report.quantization.run.distributions.mean_kl < 0.005


def test_linked_weights_cannot_be_quantized(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--weights link refers to the checkpoint's bytes"):
        export_checkpoint(
            CHECKPOINTS / "tiny-qwen2",
            tmp_path / "bundle",
            weights="link",
            quantization=quantization_request("int8-weight-only"),
        )
    assert listed(tmp_path) == []


def test_recipe_that_the_device_cannot_use_is_refused_with_alternatives() -> None:
    with pytest.raises(UnsupportedError, match=r"a100 \(SM 80\) has no FP8.*choose one of int8-w8a8"):
        require_device(recipes.get("fp8"), get_device("a100"))
    with pytest.raises(UnsupportedError, match=r"FP8"):
        require_device(recipes.get("int8-w8a8").changed(cache="fp8"), get_device("jetson-orin-nano"))
    require_device(recipes.get("fp8"), get_device("jetson-thor"))


def test_report_that_cannot_be_written_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = quantized_export.QuantizedExport.judge

    def obstructed(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "bundle.accuracy.html").mkdir()  # in the way of the report, since the export began
        return judge(*arguments, **options)

    monkeypatch.setattr(quantized_export.QuantizedExport, "judge", obstructed)
    with pytest.raises(UserError, match=r"cannot write .*bundle.accuracy.html"):
        quantized(tmp_path / "bundle", budget="top1=1")
    assert "bundle" not in listed(tmp_path)
    assert not [name for name in listed(tmp_path) if name.startswith(".bundle.accuracy")]
