"""Who computes attention and experts of an ort-cuda graph: preferences by GPU, overridden by what is asked for."""

from __future__ import annotations

import pytest

from qwenforge import lowering_choice, ort_cuda_choice, tensorrt_choice
from qwenforge.devices import DEVICES
from qwenforge.errors import UnsupportedError, UserError
from qwenforge.ort_cuda_choice import ANY_GPU, PREFERENCES, OrtCudaChoice, captures_decode, needs_library


def test_every_device_has_a_preference_that_says_what_it_rests_on() -> None:
    assert {device.sm for device in DEVICES.values()} <= set(PREFERENCES)
    for preference in (*PREFERENCES.values(), ANY_GPU):
        assert preference.basis == "estimate, not measured" or preference.basis.startswith("bench/results/")


@pytest.mark.parametrize("device", [None, "h200", "jetson-orin-nano"])
def test_what_is_not_asked_for_is_preferred(device: str | None) -> None:
    choice = ort_cuda_choice.choose(device=device)
    assert (choice.attention, choice.experts, choice.basis) == ("native", "plugin", "estimate, not measured")
    assert choice.record(routed=True).sm == (DEVICES[device].sm if device else None)


def test_what_is_asked_for_is_taken() -> None:
    half = ort_cuda_choice.choose(attention="plugin")
    assert (half.attention, half.experts, half.basis) == ("plugin", "plugin", "estimate, not measured")
    whole = ort_cuda_choice.choose(attention="plugin", experts="native")
    assert (whole.attention, whole.experts, whole.basis) == ("plugin", "native", "asked for")


def test_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="h2oo"):
        ort_cuda_choice.choose(device="h2oo")


@pytest.mark.parametrize(
    ("attention", "experts", "routed", "library", "captured"),
    [
        ("native", "plugin", False, False, False),
        ("native", "plugin", True, True, False),
        ("native", "native", True, False, False),
        ("plugin", "native", False, True, True),
    ],
)
def test_record_tells_whether_the_library_is_needed_and_decode_captured(
    attention: tensorrt_choice.Operator, experts: tensorrt_choice.Operator, routed: bool, library: bool, captured: bool
) -> None:
    record = ort_cuda_choice.choose(attention=attention, experts=experts).record(routed=routed)
    assert record.moe == (experts if routed else "none")
    assert (needs_library(record), captures_decode(record)) == (library, captured)


def test_flags_of_tensorrt_are_refused() -> None:
    with pytest.raises(UserError, match="--tensorrt belongs to --target tensorrt, not to ort-cuda"):
        lowering_choice.choose("ort-cuda", version="11.4")
    with pytest.raises(UserError, match="--weights-as belongs to --target tensorrt, not to ort-cuda"):
        lowering_choice.choose("ort-cuda", weights_as="inputs")


def test_every_target_gets_its_own_choice() -> None:
    assert isinstance(lowering_choice.choose("ort-cuda", device="h200"), OrtCudaChoice)
    assert isinstance(lowering_choice.choose("tensorrt-rtx"), tensorrt_choice.TensorRTChoice)
    assert lowering_choice.choose("ort-cpu") is None
