"""One CachedAttention in real ONNX Runtime sessions, com.microsoft's GroupQueryAttention beside it, and float64.

Run as a program, it prints how far every case is from float64: the library reads its instruction set once a process.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

OURS = ("CachedAttention", "qwenforge.cpu")
MICROSOFT = ("GroupQueryAttention", "com.microsoft")

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """``sequence`` new tokens of each row behind ``starts`` [B] old ones, in caches of ``capacity`` tokens."""

    starts: tuple[int, ...]
    sequence: int = 1
    heads: int = 14
    kv_heads: int = 2
    size: int = 64
    spare: int = 5
    window: int = -1
    rotates: bool = True
    rotated: int | None = None
    """Dimensions of a head that turn; None for all."""
    scale: float | None = None
    given_positions: bool = True
    shift: int = 0
    """What is added to a token's index to make its position."""

    @property
    def capacity(self) -> int:
        return max(self.starts) + self.sequence + self.spare

    @property
    def attributes(self) -> dict[str, Any]:
        found: dict[str, Any] = {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "do_rotary": int(self.rotates)}
        if self.window != -1:
            found["local_window_size"] = self.window
        if self.scale is not None:
            found["scale"] = self.scale
        return found


CASES = {
    **{f"group of {g}": Case((40,), heads=2 * g, kv_heads=2, size=64) for g in range(1, 9)},
    **{f"{s} tokens, head size {d}": Case((0,), s, 4, 2, d) for s in (2, 17) for d in (8, 64, 96, 128)},
    **{f"one token, head size {d}": Case((300,), 1, 6, 2, d) for d in (2, 6, 8, 36, 80, 96, 128)},
    "head size 20, several tiles of queries": Case((70,), 50, 6, 2, 20),
    "nothing in the cache": Case((0,)),
    "unequal rows": Case((0, 300, 63, 64)),
    "unequal rows, several tokens": Case((0, 130, 7), 5, 4, 2),
    "unequal rows, several tiles of queries": Case((3, 200), 40, 8, 1),
    "shares of the keys": Case((1500,), heads=7, kv_heads=1),
    "shares of the keys, of many heads": Case((1500,), heads=12, kv_heads=1),
    "shares of the keys, unequal rows": Case((1100, 3), 2, heads=4, kv_heads=1),
    "shares of the keys, new tokens in two of them": Case((940,), 90, heads=1, kv_heads=1),
    "shares of a window": Case((1500,), heads=4, kv_heads=1, window=700),
    "prompt": Case((0,), 128),
    "prompts": Case((0, 0), 33, 4, 4),
    "prompt behind a part-filled cache": Case((300,), 256),
    "prompt of one head each": Case((90,), 256, 4, 4, 128),
    "window": Case((100,), window=37),
    "window of one": Case((100,), 3, window=1),
    "window, prompt": Case((70,), 130, 8, 2, window=50),
    "no rotation": Case((20,), 3, rotates=False),
    "part of a head turns": Case((20,), 3, rotated=32),
    "scale": Case((20,), 3, scale=0.2),
    "positions left out": Case((20, 3), 3, given_positions=False),
    "other positions": Case((20,), 3, shift=4),
    "full cache": Case((200,), 3, spare=0),
}


class Results(NamedTuple):
    """output [B, S, H D] and the caches [B, Hk, M, D]."""

    output: Array
    keys: Array
    values: Array


def random_inputs(case: Case, seed: int = 0) -> dict[str, Array]:
    """Every input; the caches hold NaN where no token is."""
    random = np.random.default_rng(seed)
    rows, half = len(case.starts), (case.rotated or case.size) // 2
    ends = np.array(case.starts) + case.sequence
    angles = np.arange(case.capacity + case.shift)[:, None] * 100.0 ** -(np.arange(half) / half)
    width = (case.heads + 2 * case.kv_heads) * case.size
    inputs: dict[str, Array] = {"query": random.standard_normal((rows, case.sequence, width), np.float32)}
    for name in ("past_key", "past_value"):
        shape = (rows, case.kv_heads, case.capacity, case.size)
        inputs[name] = random.standard_normal(shape, np.float32)
        for row, start in enumerate(case.starts):
            inputs[name][row, :, start:] = np.nan
    inputs["seqlens_k"] = (ends - 1).astype(np.int32)
    inputs["total_sequence_length"] = np.array(ends.max(), np.int32)
    if case.rotates:
        inputs["cos_cache"], inputs["sin_cache"] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        if case.given_positions:
            inputs["position_ids"] = np.array(case.starts)[:, None] + np.arange(case.sequence) + case.shift
    return inputs


def model(
    inputs: Mapping[str, Array], attributes: Mapping[str, Any], operator: tuple[str, str] = OURS
) -> onnx.ModelProto:
    """A graph of one node that is called "layer 0" and has the inputs that ``inputs`` names, of open extents."""
    names = (
        "query key value past_key past_value seqlens_k total_sequence_length cos_cache sin_cache position_ids".split()
    )
    given = [name if name in inputs else "" for name in names]
    while not given[-1]:
        given.pop()
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node(operator[0], given, outputs, name="layer 0", domain=operator[1], **attributes)
    values = []
    for name in filter(None, given):
        element = helper.np_dtype_to_tensor_dtype(inputs[name].dtype)
        values.append(helper.make_tensor_value_info(name, element, [None] * inputs[name].ndim))
    results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
        for name, rank in zip(outputs, (3, 4, 4), strict=True)
    ]
    graph = helper.make_graph([node], "attention", values, results)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(operator[1], 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(library: Path, made: onnx.ModelProto, threads: int = 2) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # a refusal is a test's result
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_in_place(made: Any, inputs: Mapping[str, Array]) -> Results:
    """The caches are bound as past and as present; those of ``inputs`` stay as they are."""
    binding = made.io_binding()
    caches = {name: inputs[name].copy() for name in ("past_key", "past_value")}
    for name, array in inputs.items():
        kept = caches.get(name, array)
        binding.bind_input(name, "cpu", 0, kept.dtype, kept.shape, kept.ctypes.data)
        if name in caches:
            present = name.replace("past", "present")
            binding.bind_output(present, "cpu", 0, kept.dtype, kept.shape, kept.ctypes.data)
    binding.bind_output("output", "cpu")
    made.run_with_iobinding(binding)
    return Results(binding.get_outputs()[2].numpy(), *caches.values())


def run_apart(made: Any, inputs: Mapping[str, Array]) -> Results:
    """The present caches are new tensors."""
    return Results(*made.run(["output", "present_key", "present_value"], dict(inputs)))


def expected(case: Case, inputs: Mapping[str, Array]) -> Results:
    """In float64, one query after the other, of exactly the keys that it sees."""
    rows, tokens = len(case.starts), case.sequence
    packed = inputs["query"].astype(np.float64).reshape(rows, tokens, case.heads + 2 * case.kv_heads, case.size)
    queries, keys, values = np.split(packed, [case.heads, case.heads + case.kv_heads], 2)
    if case.rotates:
        own = np.array(case.starts)[:, None] + np.arange(tokens)
        positions = inputs.get("position_ids", own)
        cos, sin = (inputs[name].astype(np.float64)[positions][:, :, None] for name in ("cos_cache", "sin_cache"))
        queries, keys = _turned(queries, cos, sin), _turned(keys, cos, sin)
    caches = [inputs[name].astype(np.float64) for name in ("past_key", "past_value")]
    output = np.empty_like(queries)
    scale = case.scale or 1 / math.sqrt(case.size)
    for row, start in enumerate(case.starts):
        for cache, new in zip(caches, (keys, values), strict=True):
            cache[row, :, start : start + tokens] = new[row].swapaxes(0, 1)
        for token in range(tokens):
            end = start + token + 1
            seen = slice(max(0, end - case.window) if case.window != -1 else 0, end)
            for head in range(case.heads):
                kv_head = head // (case.heads // case.kv_heads)
                scores = scale * caches[0][row, kv_head, seen] @ queries[row, token, head]
                weights = np.exp(scores - scores.max())
                output[row, token, head] = weights @ caches[1][row, kv_head, seen] / weights.sum()
    return Results(output.reshape(rows, tokens, -1), *caches)


def _turned(heads: Array, cos: Array, sin: Array) -> Array:
    """Half-split rotation of the first dimensions of ``heads`` [B, S, H, D] by ``cos``, ``sin`` [B, S, 1, D' / 2]."""
    half = cos.shape[-1]
    first, second, rest = np.split(heads, [half, 2 * half], -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def distances(case: Case, inputs: Mapping[str, Array], found: Results) -> dict[str, float]:
    """Largest errors of the output and of the appended keys, each relative to the largest value.

    Raises:
        AssertionError: a value is another one, or the caches are not what they were elsewhere.
    """
    exact = expected(case, inputs)
    for row, start in enumerate(case.starts):
        new = slice(start, start + case.sequence)
        for cache, name in ((found.keys, "past_key"), (found.values, "past_value")):
            kept = np.delete(cache[row], np.arange(new.start, new.stop), 1)
            assert np.array_equal(
                kept, np.delete(inputs[name][row], np.arange(new.start, new.stop), 1), equal_nan=True
            ), f"{name}, row {row}"
        assert np.array_equal(found.values[row, :, new], exact.values[row, :, new].astype(np.float32))
    appended = [
        (found.keys[row, :, start : start + case.sequence], exact.keys[row, :, start : start + case.sequence])
        for row, start in enumerate(case.starts)
    ]
    return {
        "output": float(np.abs(found.output - exact.output).max() / np.abs(exact.output).max()),
        "keys": max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in appended),
    }


def main() -> None:
    """Prints a JSON object: distances in place by the name of the case."""
    library = Path(sys.argv[1])
    measured = {}
    for name, case in CASES.items():
        inputs = random_inputs(case)
        measured[name] = distances(case, inputs, run_in_place(session(library, model(inputs, case.attributes)), inputs))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
