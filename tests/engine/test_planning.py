"""Plans: counts against the official ones, rooflines against arithmetic by hand, choices that can be argued."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from qwenforge.cli.main import main
from qwenforge.devices import DEVICES, GB, get_device
from qwenforge.engine.planning.known_models import KNOWN_MODELS, model_config
from qwenforge.engine.planning.model_size import cache_bytes_per_token, count_parameters, experts_read
from qwenforge.engine.planning.plan import DEVICE_COUNTS, Plan, Workload, make_plan
from qwenforge.engine.planning.recipes import RECIPES
from qwenforge.errors import UnsupportedError, UserError
from qwenforge.exporter.checkpoint import Checkpoint
from support.checkpoints import make_checkpoint

OFFICIAL = {
    "qwen2-0.5b": 0.494e9,
    "qwen2-1.5b": 1.544e9,
    "qwen2-7b": 7.616e9,
    "qwen2-72b": 72.706e9,
    "qwen2-57b-a14b": 57.409e9,
    "qwen1.5-moe-a2.7b": 14.316e9,
}
"""Parameters as the models' own pages give them."""


def plan(model: str, device: str, **workload: int | str) -> Plan:
    options = {"max_length": 4096} | workload
    return make_plan(model_config(model)[1], get_device(device), Workload(**options))  # type: ignore[arg-type]


def test_every_official_model_has_its_number_of_parameters() -> None:
    assert set(KNOWN_MODELS) == set(OFFICIAL)
    for name, official in OFFICIAL.items():
        assert count_parameters(model_config(name)[1]).total == pytest.approx(official, rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_that_a_checkpoint_stores(tmp_path: Path, kind: str, tied: bool) -> None:
    options = {"tokenizer": False, "tie_word_embeddings": tied}
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, kind, **options))  # type: ignore[arg-type]
    stored = sum(checkpoint.tensor(name).size for name in checkpoint.names)
    assert count_parameters(checkpoint.config).total == stored


def test_cache_of_a_token_is_keys_and_values_of_every_layer() -> None:
    config = model_config("qwen2-7b")[1]
    assert cache_bytes_per_token(config, 2.0) == 2 * 28 * 4 * 128 * 2


@pytest.mark.parametrize(("tokens", "share"), [(0, 0.0), (1, 8 / 64), (2, 1 - (56 / 64) ** 2), (10_000, 1.0)])
def test_share_of_experts_that_tokens_read(tokens: int, share: float) -> None:
    assert experts_read(model_config("qwen2-57b-a14b")[1], tokens) == pytest.approx(share)
    assert experts_read(model_config("qwen2-7b")[1], tokens) == 0.0


def test_decode_of_one_row_is_bytes_over_bandwidth() -> None:
    found = next(recipe for recipe in plan("qwen2-7b", "h200").recipes if recipe.recipe.name == "bf16")
    weights = (7_615_616_512 - 152064 * 3584 + 3584) * 2  # all but the embedding, of which one row is read
    cache = 4096 * 2 * 28 * 4 * 128 * 2
    assert found.itl.limit == "memory bandwidth"
    assert found.itl.seconds == pytest.approx((weights + cache) / 4.8e12, rel=1e-9)


def test_long_prefill_is_operations_over_the_dense_rate() -> None:
    found = next(recipe for recipe in plan("qwen2-7b", "h200", prompt_tokens=4096).recipes)
    matrices = 2 * (4096 * (7_615_616_512 - 2 * 152064 * 3584) + 152064 * 3584)
    attention = 4 * 28 * 28 * 128 * 4096 * 4097 / 2
    assert found.ttft.limit == "arithmetic"
    assert found.ttft.seconds == pytest.approx((matrices + attention) / 989e12, rel=1e-9)


def test_batch_makes_decode_of_a_small_cache_arithmetic() -> None:
    few, many = (plan("qwen2-7b", "l4", max_length=16, prompt_tokens=8, max_batch=batch) for batch in (1, 4096))
    assert (few.recipes[0].itl.limit, many.recipes[0].itl.limit) == ("memory bandwidth", "arithmetic")


@pytest.mark.parametrize(
    ("model", "device", "recipe", "devices"),
    [
        ("qwen2-0.5b", "jetson-orin-nano", "bf16", 1),
        ("qwen2-7b", "jetson-orin-nano", "int4-weight-only", 1),
        ("qwen2-7b", "rtx-4090", "bf16", 1),
        ("qwen2-57b-a14b", "h200", "bf16", 1),
        ("qwen2-57b-a14b", "h100", "fp8", 1),
        ("qwen2-57b-a14b", "a100", "int8-w8a8", 1),
        ("qwen2-72b", "h200", "fp8", 1),
        ("qwen2-72b", "l40s", "int4-weight-only", 1),
        ("qwen2-72b", "l4", "int4-weight-only", 2),
    ],
)
def test_choice_is_the_most_exact_on_the_fewest_devices(model: str, device: str, recipe: str, devices: int) -> None:
    chosen = plan(model, device).chosen
    assert chosen is not None and (chosen.recipe.name, chosen.devices) == (recipe, devices)


def test_what_is_chosen_fits_and_one_device_less_does_not() -> None:
    for model in KNOWN_MODELS:
        for device in DEVICES.values():
            found = plan(model, device.name)
            for recipe in found.recipes:
                sizes = recipe.weight_bytes + recipe.cache_bytes
                counts = DEVICE_COUNTS[device.family]
                fits = [n for n in counts if sizes / n + recipe.workspace_bytes <= found.usable_bytes]
                assert recipe.devices == (fits[0] if fits else 0)


def test_nothing_fits_is_said_with_what_to_do() -> None:
    found = plan("qwen2-72b", "jetson-orin-nx")
    assert found.chosen is None and "nothing fits" in found.reason and "--max-length" in found.reason


def test_recipes_shrink_from_the_most_exact_to_the_smallest() -> None:
    parameters = count_parameters(model_config("qwen2-57b-a14b")[1])
    sizes = [recipe.weight_bytes(parameters) for recipe in RECIPES]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 2 * parameters.total


def test_fp8_is_refused_below_sm_89_with_the_alternatives() -> None:
    for device in DEVICES.values():
        found = plan("qwen2-0.5b", device.name)
        assert ("fp8" in found.refused) == (device.sm < 89)
        if device.sm < 89:
            assert "choose int8" in found.refused["fp8"]
            with pytest.raises(UnsupportedError, match="no FP8 arithmetic"):
                plan("qwen2-0.5b", device.name, cache="fp8")


def test_lowering_follows_version_and_device() -> None:
    config = model_config("qwen2-57b-a14b")[1]
    work = Workload(4096)
    old = make_plan(config, get_device("h100"), work, tensorrt="10.13").lowering
    new = make_plan(config, get_device("h100"), work).lowering
    thor = make_plan(config, get_device("jetson-thor"), work).lowering
    eight = make_plan(config, get_device("h100"), dataclasses.replace(work, cache="int8")).lowering
    assert "QwenForgeAttention" in old and "TensorRT 10.13" in old
    assert "TensorScatter" in new and "QwenForgeMoE, because" in new
    assert "on request as TensorRT's own layer" in thor
    assert "QwenForgeAttention" in eight and "16-bit only" in eight


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ({"max_length": 200_000}, "beyond the model's 131072 positions"),
        ({"max_length": 100, "prompt_tokens": 101}, "leaves room for"),
    ],
)
def test_impossible_workload_is_refused(workload: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan("qwen2-7b", "h200", **workload)


@pytest.mark.parametrize(
    ("name", "message"), [("h20", "did you mean h200"), ("tpu", "known are a100"), ("orin", "unknown device 'orin'")]
)
def test_unknown_device_is_refused_with_the_names(name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        get_device(name)


def test_tensorrt_that_the_device_does_not_run_is_refused() -> None:
    device = get_device("jetson-orin-nx")
    assert device.require_tensorrt(None) == "10.16" and device.require_tensorrt("10.3") == "10.3"
    with pytest.raises(UnsupportedError, match=r"choose one of 10\.3, 10\.16"):
        device.require_tensorrt("11.4")


def test_devices_are_plausible() -> None:
    for name, device in DEVICES.items():
        assert device.name == name and device.sm in (80, 86, 87, 89, 90, 100, 110, 120)
        assert 8 * GB <= device.memory_bytes <= 200 * GB and 1e11 <= device.bandwidth <= 1e13
        assert device.rates["int8"] >= device.rates["fp16"] == device.rates["bf16"]
        assert ("fp8" in device.rates) == (device.sm >= 89)
        assert device.unified_memory == (device.family == "jetson")


def test_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "Qwen2-72B", "--device", "h200", "--max-length", "8192", "--max-batch", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chosen"] == "fp8" and report["workload"]["max_batch"] == 4
    fp8 = next(recipe for recipe in report["recipes"] if recipe["name"] == "fp8")
    assert fp8["kv_cache_bytes"] == 4 * 8192 * 2 * 80 * 8 * 128 * 2
    assert all(math.isfinite(recipe["itl_seconds"]) for recipe in report["recipes"])


def test_command_prints_a_table_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "tiny", "qwen2_moe", tokenizer=False)
    (folder / "model.safetensors").unlink()  # a plan reads config.json only
    page = tmp_path / "plan.html"
    arguments = ["plan", str(folder), "--device", "jetson-orin-agx", "--max-length", "128", "--prompt-tokens", "64"]
    assert main([*arguments, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "int4-weight-only" in printed and "not fp8:" in printed and "choice: bf16" in printed
    text = page.read_text()
    assert text.count("<rect") == 3 * 4 and "usable: 61.9 GB" in text and "http" not in text


def test_command_exits_1_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen2-72b", "--device", "jetson-orin-nano"]) == 1
    assert "nothing fits" in capsys.readouterr().out


def test_unknown_model_is_refused_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen2-7c", "--device", "h200"]) == 1
    assert "did you mean qwen2-7b?" in capsys.readouterr().err


def test_page_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "absent" / "plan.html"
    assert main(["plan", "qwen2-7b", "--device", "h200", "--html", str(page)]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
