"""What a TensorRT graph is lowered to, and the wishes that are refused with what can be had instead."""

from __future__ import annotations

from typing import Any

import pytest

from qwenforge.devices import DEVICES
from qwenforge.errors import UnsupportedError, UserError
from qwenforge.tensorrt_choice import RTX_SMS, choose


@pytest.mark.parametrize(
    ("device", "version", "attention"),
    [
        ("jetson-orin-nano", None, "native"),
        ("jetson-orin-nano", "10.3", "plugin"),
        ("jetson-thor", "10.13", "plugin"),
        ("jetson-thor", "10.16", "plugin"),
        ("jetson-thor", "11.4", "native"),
        ("h200", "10.3", "plugin"),
        ("h200", "11.0", "native"),
        ("h200", "10.9.0.34", "plugin"),
        ("h200", None, "native"),
    ],
)
def test_attention_follows_the_version(device: str, version: str | None, attention: str) -> None:
    if version is None and not DEVICES[device].tensorrt[-1].startswith("11"):
        attention = "plugin"
    choice = choose("tensorrt", device=device, version=version)
    assert choice is not None
    assert (choice.attention, choice.experts, choice.weights_as) == (attention, "plugin", "constants")
    assert choice.modern_parser == (attention == "native")


@pytest.mark.parametrize("device", DEVICES)
def test_default_version_is_the_newest_that_the_device_runs(device: str) -> None:
    choice = choose("tensorrt", device=device)
    assert choice is not None and choice.version == DEVICES[device].tensorrt[-1]


@pytest.mark.parametrize("device", DEVICES)
def test_rtx_takes_exactly_the_devices_it_runs_on(device: str) -> None:
    if DEVICES[device].sm in RTX_SMS:
        choice = choose("tensorrt-rtx", device=device)
        assert choice is not None and (choice.version, choice.attention) == ("rtx", "native")
        return
    with pytest.raises(UnsupportedError, match=rf"does not run on {device} .*use --target tensorrt, or one of .*rtx-"):
        choose("tensorrt-rtx", device=device)


def test_other_targets_take_no_choice() -> None:
    assert choose("ort-cpu") is None
    with pytest.raises(
        UserError, match=r"--device belongs to --target tensorrt and tensorrt-rtx .and ort-cuda., not to ort-cpu"
    ):
        choose("ort-cpu", device="h200")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("tensorrt", {}, r"--target tensorrt needs --device, one of .*h200"),
        ("tensorrt", {"device": "h300"}, r"h300.*h200"),
        ("tensorrt", {"device": "jetson-orin-nano", "version": "9.0"}, r"9\.0.*10\.3"),
        ("tensorrt", {"device": "h200", "version": "8.6"}, r"8\.6.*11"),
        ("tensorrt", {"device": "h200", "version": "newest"}, r"newest"),
        ("tensorrt", {"device": "h200", "version": "10.3", "attention": "native"}, r"use --attention plugin"),
        ("tensorrt", {"device": "h200", "experts": "native"}, r"SM 100, 103 and 110.*--experts plugin"),
        ("tensorrt", {"device": "b200", "version": "10.13", "experts": "native"}, r"--experts plugin"),
        ("tensorrt", {"device": "b200", "version": "10.3"}, r"TensorRT 10\.3 .* b200; choose one of 10\.13"),
        (
            "tensorrt",
            {"device": "jetson-thor", "version": "11.0"},
            r"jetson-thor; choose one of 10\.13, 10\.16, 11\.4\.$",
        ),
        ("tensorrt-rtx", {"experts": "native"}, r"--experts plugin"),
        ("tensorrt-rtx", {"version": "11.4"}, r"--tensorrt belongs to --target tensorrt"),
    ],
)
def test_impossible_choice_is_refused_with_what_to_do(target: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(target, **options)


def test_record_tells_what_was_chosen() -> None:
    choice = choose("tensorrt", device="jetson-thor", experts="native", weights_as="inputs")
    assert choice is not None
    record = choice.record(routed=True, mixed=False)
    assert (record.device, record.sm, record.moe, record.weights_as) == ("jetson-thor", 110, "native", "inputs")
    assert choice.record(routed=False, mixed=True).moe == "none"
    assert choice.record(routed=False, mixed=True).attention == "mixed"
