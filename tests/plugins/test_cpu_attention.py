"""CachedAttention of libqwenforge_cpu.so in real ONNX Runtime sessions: values, caches, refusals, instruction sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenforge.engine.cpu_library import INSTRUCTION_SET_VARIABLE, find_cpu_library
from support import cpu_attention
from support.cpu_attention import (
    CASES,
    MICROSOFT,
    Array,
    Case,
    distances,
    model,
    random_inputs,
    run_apart,
    run_in_place,
    session,
)
from support.source_tree import ROOT
from support.tolerances import FLOAT32_EXACT, FLOAT32_REORDERED

# What ONNX Runtime's operator takes: rotated heads of a multiple of 16, and several tokens behind a part-filled cache
# for one row only.
COMPARABLE = {
    name: case
    for name, case in CASES.items()
    if case.size % (16 if case.rotates else 8) == 0
    and (case.sequence == 1 or len(case.starts) == 1 or not any(case.starts))
    and (case.rotates or case.given_positions)
}


FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl"],
}


def needs(instruction_set: str, library: Path) -> None:
    """Skip the test where the processor does not have ``instruction_set``."""
    best = find_cpu_library(library).instruction_set
    if not {"baseline": True, "avx2": best != "baseline", "avx512": best == "avx512-vnni"}[instruction_set]:
        pytest.skip(f"this processor has no {instruction_set}: {best} is its best")


def assert_close(measured: dict[str, float]) -> None:
    """Sums of up to some 1500 probabilities and values in another order; a rotation is two products and their sum."""
    assert measured["output"] < FLOAT32_REORDERED
    assert measured["keys"] < FLOAT32_EXACT


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64_and_appends_in_place(name: str, threads: int, cpu_library: Path) -> None:
    """Where no token is, the caches hold NaN: none of it may be read, and all of it has to stay."""
    case = CASES[name]
    inputs = random_inputs(case)
    made = session(cpu_library, model(inputs, case.attributes), threads)
    assert_close(distances(case, inputs, run_in_place(made, inputs)))


@pytest.mark.parametrize(
    "name", ["unequal rows", "prompt", "shares of the keys", "head size 20, several tiles of queries"]
)
def test_caches_apart_are_copied_first(name: str, cpu_library: Path) -> None:
    case = CASES[name]
    inputs = random_inputs(case)
    given = {cache: inputs[cache].copy() for cache in ("past_key", "past_value")}
    assert_close(distances(case, inputs, run_apart(session(cpu_library, model(inputs, case.attributes)), inputs)))
    assert all(np.array_equal(inputs[cache], given[cache], equal_nan=True) for cache in given)


@pytest.mark.parametrize("name", COMPARABLE)
def test_agrees_with_onnxruntimes_operator(name: str, cpu_library: Path) -> None:
    """Its window and its positions mean the same; it multiplies what no query sees by 0, so that may not be NaN."""
    case = COMPARABLE[name]
    inputs = {
        key: np.nan_to_num(value) if value.dtype == np.float32 else value for key, value in random_inputs(case).items()
    }
    ours = run_in_place(session(cpu_library, model(inputs, case.attributes)), inputs)
    theirs = run_in_place(session(cpu_library, model(inputs, case.attributes, MICROSOFT)), inputs)
    for found, other, tolerance in zip(ours, theirs, (FLOAT32_REORDERED, FLOAT32_EXACT, 0.0), strict=True):
        assert np.abs(found - other).max() <= tolerance * np.abs(other).max()


@pytest.mark.parametrize("instruction_set", FLAGS)
def test_every_instruction_set_agrees_with_float64(instruction_set: str, cpu_library: Path) -> None:
    needs(instruction_set, cpu_library)
    environment = {**os.environ, INSTRUCTION_SET_VARIABLE: instruction_set, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", cpu_attention.__name__, cpu_library]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    measured = json.loads(finished.stdout)
    assert measured.keys() == CASES.keys()
    for found in measured.values():
        assert_close(found)


@pytest.mark.parametrize("instruction_set", FLAGS)
def test_kernels_stay_inside_of_their_buffers(instruction_set: str, cpu_library: Path, tmp_path: Path) -> None:
    """On buffers that end where the last token does; sanitized."""
    needs(instruction_set, cpu_library)
    command = ["g++", "-std=c++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    command += [f"-I{ROOT / 'plugins'}", f"-DQWENFORGE_ATTENTION=k{instruction_set.capitalize()}Attention"]
    command += [*FLAGS[instruction_set], str(ROOT / "tests" / "cpp" / "cpu_attention.cpp")]
    command += [str(ROOT / "plugins" / "cpu" / f"attention_{instruction_set}.cpp"), "-o", str(tmp_path / "checks")]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    finished = subprocess.run([tmp_path / "checks"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert int(finished.stdout) > 10_000


def test_one_session_takes_every_extent(cpu_library: Path) -> None:
    first = Case((3,), heads=6)
    made = session(cpu_library, model(random_inputs(first), first.attributes))
    for starts, sequence, spare, size in (
        ((0,), 7, 0, 64),
        ((7, 3, 0, 9), 1, 40, 16),
        ((900,), 130, 3, 32),
        ((5,), 1, 1, 8),
    ):
        case = replace(first, starts=starts, sequence=sequence, spare=spare, size=size)
        inputs = random_inputs(case)
        assert_close(distances(case, inputs, run_in_place(made, inputs)))
    case = replace(first, sequence=0)
    inputs = random_inputs(case)
    found = run_in_place(made, inputs)
    assert found.output.size == 0 and np.array_equal(found.keys, inputs["past_key"], equal_nan=True)


@pytest.mark.parametrize("cache", ["past_key", "past_value"])
@pytest.mark.parametrize(
    "case",
    [
        Case((150,), 90, heads=14),
        Case((150,), 90, heads=8, window=20),
        Case((150,), 3, heads=4, kv_heads=2),
        Case((150,), 3, heads=4, kv_heads=2, window=4),
        Case((70,), 60, heads=2, kv_heads=2, size=20),
    ],
    ids=["prompt", "window", "few tokens", "few tokens, window", "head size 20"],
)
def test_nan_reaches_the_queries_that_see_it_and_no_other(case: Case, cache: str, cpu_library: Path) -> None:
    """In an old token for those whose window has left it behind, and in a new one for those before it."""
    inputs = random_inputs(case)
    made = session(cpu_library, model(inputs, case.attributes))
    clean = run_in_place(made, inputs)
    shape = (1, case.sequence, case.kv_heads, case.heads // case.kv_heads, case.size)
    group = case.heads * case.size, case.kv_heads * case.size
    for index in (case.starts[0] - 2, case.starts[0] + case.sequence // 2):
        spoilt = {name: array.copy() for name, array in inputs.items()}
        token = index - case.starts[0]
        if token < 0:
            spoilt[cache][0, 1, index] = np.nan
        else:  # of the second head
            first = group[0] + case.size + (group[1] if cache == "past_value" else 0)
            spoilt["query"][0, token, first : first + case.size] = np.nan
        found = run_in_place(made, spoilt).output.reshape(shape)
        tokens = np.arange(case.sequence)
        sees = tokens >= token
        if case.window != -1:
            sees &= tokens - token < case.window
        assert np.isnan(found[0, sees, 1]).all()
        assert np.array_equal(found[0, ~sees], clean.output.reshape(shape)[0, ~sees])
        assert np.array_equal(found[0, :, 0], clean.output.reshape(shape)[0, :, 0])


def test_scores_far_apart_do_not_overflow(cpu_library: Path) -> None:
    """Some +-150 of them, rising and falling along the keys: e^150 is no fp32 number, and nor is e^-150."""
    for case in (Case((700,), heads=2, kv_heads=1), Case((200,), 70, heads=4)):
        inputs = random_inputs(case)
        inputs["query"][..., : case.heads * case.size] *= 30
        found = run_in_place(session(cpu_library, model(inputs, case.attributes)), inputs)
        # A score of 150 is rounded by 150 * 2^-24 = 1e-5, and its probability by as much of itself.
        assert distances(case, inputs, found)["output"] < 5 * FLOAT32_REORDERED


def changed(**arrays: Array) -> Callable[[dict[str, Array]], None]:
    return lambda inputs: inputs.update(arrays)


REFUSED_CALLS: dict[str, tuple[Callable[[dict[str, Array]], None], str]] = {
    "a full cache": (changed(seqlens_k=np.array([4, 12], np.int32)), "seqlens_k is 12 for row 1.*capacity is 12"),
    "fewer keys than new tokens": (changed(seqlens_k=np.array([0, 4], np.int32)), "seqlens_k is 0 for row 0"),
    "a negative last key": (changed(seqlens_k=np.array([4, -3], np.int32)), "seqlens_k is -3 for row 1"),
    "rows": (changed(seqlens_k=np.array([4], np.int32)), r"seqlens_k has shape \[1\]"),
    "a position behind the table": (
        changed(position_ids=np.array([[0, 1], [2, 12]])),
        "position of token 1 of row 1 is 12, and cos_cache has 12 positions",
    ),
    "a negative position": (changed(position_ids=np.array([[-1, 1], [2, 3]])), "position of token 0 of row 0 is -1"),
    "positions of other extents": (changed(position_ids=np.array([[0, 1]])), r"position_ids has shape \[1, 2\]"),
    "a wide table": (changed(cos_cache=np.ones((12, 9), np.float32)), r"cos_cache has shape \[12, 9\].*at most half"),
    "another table of sines": (changed(sin_cache=np.ones((11, 8), np.float32)), r"sin_cache has shape \[11, 8\]"),
    "a query of another width": (
        changed(query=np.ones((2, 2, 120), np.float32)),
        r"query has shape \[2, 2, 120\].*128",
    ),
    "another number of heads": (
        changed(past_key=np.ones((2, 1, 12, 16), np.float32)),
        r"past_key has shape \[2, 1, 12",
    ),
    "values of another capacity": (
        changed(past_value=np.ones((2, 2, 11, 16), np.float32)),
        r"past_value has shape \[2, 2",
    ),
    "an odd head size": (
        changed(past_key=np.ones((2, 2, 12, 15), np.float32), query=np.ones((2, 2, 120), np.float32)),
        "head size, the last extent of past_key, is 15",
    ),
}


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_call_that_would_leave_a_buffer_is_refused(name: str, cpu_library: Path) -> None:
    change, sentence = REFUSED_CALLS[name]
    case = Case((3, 8), 2, heads=4, kv_heads=2, size=16, spare=2)
    inputs = random_inputs(case)
    made = session(cpu_library, model(inputs, case.attributes))
    change(inputs)
    with pytest.raises(
        Exception, match=f"CachedAttention 'layer 0': {sentence}|CachedAttention 'layer 0': the {sentence}"
    ):
        run_apart(made, inputs)


REFUSED_NODES: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_heads": 0}, "num_heads is 0 and has to be positive"),
    "heads without a group": ({"num_heads": 5}, "num_heads is 5, no multiple of kv_num_heads, which is 2"),
    "a window of nothing": ({"local_window_size": 0}, "local_window_size is 0"),
    "interleaved rotation": ({"rotary_interleaved": 1}, "rotary_interleaved, softcap and smooth_softmax"),
    "soft cap": ({"softcap": 30.0}, "rotary_interleaved, softcap and smooth_softmax"),
}


@pytest.mark.parametrize("name", REFUSED_NODES)
def test_node_that_means_something_else_is_refused(name: str, cpu_library: Path) -> None:
    attributes, sentence = REFUSED_NODES[name]
    case = Case((3,), heads=4)
    with pytest.raises(Exception, match=f"CachedAttention 'layer 0': {sentence}"):
        session(cpu_library, model(random_inputs(case), {**case.attributes, **attributes}))


def test_missing_and_surplus_inputs_are_refused(cpu_library: Path) -> None:
    case = Case((3,), heads=4)
    inputs = random_inputs(case)
    without = {name: array for name, array in inputs.items() if name != "sin_cache"}
    with pytest.raises(Exception, match="do_rotary is 1 but cos_cache or sin_cache is left out"):
        session(cpu_library, model(without, case.attributes))
    with pytest.raises(Exception, match="key and value are connected"):
        session(cpu_library, model({**inputs, "key": inputs["query"]}, case.attributes))
    with pytest.raises(Exception, match="the attribute num_heads, an integer, is missing"):
        session(cpu_library, model(inputs, {"kv_num_heads": 2}))
