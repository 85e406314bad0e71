"""CachedAttention with caches in float16: the bits of what it stores, and what a query makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.cpu_attention import CASES, Array, Case, distances, model, random_inputs, run_in_place, session
from support.cpu_runs import Answer, Job
from support.tolerances import FLOAT32_EXACT, FLOAT32_REORDERED

LARGEST = 65504.0
"""Of float16's finite numbers."""

# Head sizes of whole vectors and of a rest; one new token and a prompt.
STORED = {
    f"{sequence} tokens, head size {size}": Case(
        (3,), sequence, heads=8, kv_heads=8, size=size, rotates=False, cache="float16"
    )
    for sequence in (1, 40)
    for size in (64, 20)
}


def awkward_numbers() -> Array:
    """Ties to both sides, subnormal numbers and their ends, what overflows, infinities and NaN; both signs."""
    tiny = 2.0**-24
    magnitudes = [0, tiny, tiny / 2, np.nextafter(np.float32(tiny / 2), 1), 1.5 * tiny, 2.5 * tiny, 1e-30, 1e-40]
    magnitudes += [1023.5 * tiny, 2.0**-14, np.nextafter(np.float32(2.0**-14), 0)]
    magnitudes += [1 + 2.0**-11, 1 + 3 * 2.0**-11, np.nextafter(np.float32(1 + 2.0**-11), 2), 2049, 2051, 0.1]
    magnitudes += [65503, LARGEST, 65519, 65520, 65536, 1e6, 3e38, np.inf, np.nan]
    one_sign = np.array(magnitudes, np.float32)
    return np.concatenate([one_sign, -one_sign])


def awkward_inputs(case: Case) -> dict[str, Array]:
    inputs = random_inputs(case)
    keys = case.heads * case.size
    count = inputs["query"][..., keys:].size
    random = np.random.default_rng(1).standard_normal(count, np.float32)
    # Of every exponent that float16 has, and awkward ones at every place of a vector.
    random *= np.float32(2.0) ** np.random.default_rng(2).integers(-26, 18, count)
    numbers = awkward_numbers()
    places = np.random.default_rng(3).permutation(count)[: count // 2]
    random[places] = np.resize(numbers, places.size)
    inputs["query"][..., keys:] = random.reshape(*inputs["query"].shape[:-1], -1)
    return inputs


INPUTS = {name: awkward_inputs(case) for name, case in STORED.items()}
JOBS = {
    name: Job(model(INPUTS[name], case.attributes).SerializeToString(), INPUTS[name]) for name, case in STORED.items()
}


@pytest.mark.parametrize("name", STORED)
def test_stored_bits_are_those_of_the_nearest_number(name: str, answers: Mapping[str, Answer]) -> None:
    """NumPy rounds to nearest, ties to even; beyond the largest number that one is stored, and infinity stays."""
    case = STORED[name]
    new = INPUTS[name]["query"].reshape(case.sequence, 3, case.kv_heads, case.size)[:, 1:]
    nearest = np.where(np.isinf(new), new, np.clip(new, -LARGEST, LARGEST)).astype(np.float16)
    for cache, which in zip(answers[name].runs[0][1:], (0, 1), strict=True):
        stored, wanted = cache[0, :, 3 : 3 + case.sequence].swapaxes(0, 1), nearest[:, which]
        assert stored.dtype == np.float16
        assert np.array_equal(np.isnan(stored), np.isnan(wanted)) and np.isnan(wanted).any()
        number = ~np.isnan(wanted)
        assert np.array_equal(stored[number].view(np.uint16), wanted[number].view(np.uint16))


def test_every_float16_number_is_read(answers: Mapping[str, Answer]) -> None:
    """As a value that is the only one a query sees: its bits come back through the arithmetic."""
    found = answers["every number"].runs[0][0]
    exact = EVERY["past_value"][:, :, 0].astype(np.float32)[:, None].reshape(found.shape)
    assert np.array_equal(found, exact, equal_nan=True)


def every_number() -> tuple[Case, dict[str, Array]]:
    """In 1024 rows of one old token; a new one that weighs nothing, by a score some 200 below the old one's."""
    case = Case((1,) * 1024, heads=1, kv_heads=1, size=64, spare=0, rotates=False, scale=1.0, cache="float16")
    inputs = random_inputs(case)
    inputs["past_value"][:, 0, 0] = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(1024, 64)
    inputs["query"][...] = 0
    inputs["query"][..., 0] = 1  # the query's
    inputs["query"][..., 64] = -200  # the new key's
    inputs["past_key"][:, :, 0] = 0
    return case, inputs


_case, EVERY = every_number()
JOBS["every number"] = Job(model(EVERY, _case.attributes).SerializeToString(), EVERY)


@pytest.mark.parametrize("cache", ["past_key", "past_value"])
def test_nan_reaches_the_queries_that_see_it_and_no_other(cache: str, cpu_library: Path) -> None:
    case = Case((150,), 90, heads=14, window=20, cache="float16")
    inputs = random_inputs(case)
    made = session(cpu_library, model(inputs, case.attributes))
    clean = run_in_place(made, inputs).output.reshape(90, 2, -1)
    inputs[cache][0, 1, 148] = np.nan
    found = run_in_place(made, inputs).output.reshape(90, 2, -1)
    assert np.isnan(found[:18, 1]).all()
    assert np.array_equal(found[18:], clean[18:]) and np.array_equal(found[:, 0], clean[:, 0])


def test_finite_numbers_beyond_the_largest_do_not_spoil_the_output(cpu_library: Path) -> None:
    case = replace(CASES["no rotation"], cache="float16")
    inputs = random_inputs(case)
    inputs["query"][..., (case.heads + case.kv_heads) * case.size :] *= 1e5
    found = run_in_place(session(cpu_library, model(inputs, case.attributes)), inputs)
    assert np.abs(found.values[:, :, 20:23]).max() == LARGEST
    assert np.isfinite(found.output).all() and np.abs(found.output).max() > 1000


def test_one_library_has_both_types_in_one_process(cpu_library: Path) -> None:
    """The same graph but for its caches: each session gets the kernels of its own."""
    for cache in ("float16", "float32", "float16"):
        case = replace(CASES["unequal rows"], cache=cache)
        inputs = random_inputs(case)
        measured = distances(case, inputs, run_in_place(session(cpu_library, model(inputs, case.attributes)), inputs))
        assert measured["output"] < FLOAT32_REORDERED and measured["keys"] < FLOAT32_EXACT


def test_keys_and_values_of_two_types_are_refused(cpu_library: Path) -> None:
    case = Case((3,), heads=4, cache="float16")
    inputs = random_inputs(case)
    inputs["past_value"] = inputs["past_value"].astype(np.float32)
    with pytest.raises(Exception, match="CachedAttention"):
        session(cpu_library, model(inputs, case.attributes))
