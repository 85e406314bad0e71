"""QwenForgeMoE as a custom op: the built library; and real sessions, the kernels emulated, against float64."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from qwenforge.plugins.moe.packing import ROW_GROUP, Expert, WeightType, pack_experts, unpack_int4, unpack_int8
from support import simt
from support.ort_custom_op import PLUGINS, SPEC, generate_header, moe_model, ort_library, session
from support.plugin_library import cmake, cuda_folder, why_missing
from support.source_tree import ROOT
from support.tolerances import BFLOAT16, FLOAT8, FLOAT16

needs_library = pytest.mark.skipif(bool(why_missing()), reason=why_missing() or "-")
needs_kernels = pytest.mark.skipif(bool(simt.why_missing()), reason=simt.why_missing() or "-")

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
CPP = ROOT / "tests" / "cpp"
TOLERANCES = {"float16": FLOAT16, "bfloat16": BFLOAT16}


@dataclass(frozen=True)
class Case:
    """C hidden size, I width, E experts, El local and Es shared ones, K of a token."""

    hidden: int = 64
    width: int = 64
    experts: int = 6
    shared: int = 0
    top_k: int = 2
    normalize: bool = False
    weights: WeightType = WeightType.FLOAT
    group_size: int = ROW_GROUP
    first_local: int = 0
    local: int = 6
    dtype: str = "float16"

    @property
    def attributes(self) -> dict[str, int]:
        """As the node has them."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_experts": self.experts,
            "first_local_expert": self.first_local,
            "num_local_experts": self.local,
            "num_shared_experts": self.shared,
            "top_k": self.top_k,
            "normalize_topk": int(self.normalize),
            "weight_type": int(self.weights),
            "group_size": self.group_size,
            "layout_version": 1,
        }


@dataclass(frozen=True)
class Weights:
    """The node's initializers, and the float64 values that they stand for: gate, up [El + Es, I, C], down."""

    tensors: dict[str, np.ndarray]
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @staticmethod
    def random(case: Case, seed: int = 0) -> Weights:
        generator = np.random.default_rng(seed)
        stored, dtype = case.local + case.shared, DTYPES[case.dtype]

        def draw(*shape: int) -> np.ndarray:
            return np.asarray(generator.standard_normal(shape) * shape[-1] ** -0.5, dtype)

        gate, up = draw(stored, case.width, case.hidden), draw(stored, case.width, case.hidden)
        down = draw(stored, case.hidden, case.width)
        experts = (Expert(*one) for one in zip(gate, up, down, strict=True))
        made = list(pack_experts(experts, case.weights, group_size=case.group_size, scale_dtype=dtype))
        parts = {"gate_up_weights": "gate_up", "down_weights": "down"}
        if case.weights is not WeightType.FLOAT:
            parts |= {"gate_up_scales": "gate_up_scales", "down_scales": "down_scales"}
        tensors = {name: np.stack([getattr(one, part) for one in made]) for name, part in parts.items()}
        if case.weights is WeightType.FLOAT8:
            tensors["activation_scales"] = np.linspace(0.008, 0.012, 1 + stored, dtype=np.float32)
        rows = _values(case, tensors["gate_up_weights"], tensors.get("gate_up_scales")).unflatten(1, (-1, 2, 8))
        columns = _values(case, tensors["down_weights"], tensors.get("down_scales"))
        return Weights(tensors, rows[:, :, 0].flatten(1, 2), rows[:, :, 1].flatten(1, 2), columns)


def _values(case: Case, data: np.ndarray, scales: np.ndarray | None) -> torch.Tensor:
    """float64, [stored, rows, columns]."""
    if scales is None:
        return torch.from_numpy(data.astype(np.float64))
    unpack: dict[WeightType, Callable[[np.ndarray], np.ndarray]] = {
        WeightType.INT8: unpack_int8,
        WeightType.INT4: unpack_int4,
        WeightType.FLOAT8: lambda packed: packed.view(ml_dtypes.float8_e4m3fn),
    }
    values = unpack[case.weights](data).astype(np.float64)
    of_column = np.repeat(scales.astype(np.float64), case.group_size, 1)[:, : values.shape[-1]]
    return torch.from_numpy(values * np.swapaxes(of_column, 1, 2))


def _feeds(case: Case, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 arrays of numbers that the case's type has."""
    generator = np.random.default_rng(100 + seed)
    widths = {"hidden_states": case.hidden, "router_logits": case.experts}
    widths |= {"shared_gate_logits": 1} if case.shared else {}
    drawn = {f"{name}_float": generator.standard_normal((tokens, width)) for name, width in widths.items()}
    return {name: value.astype(DTYPES[case.dtype]).astype(np.float32) for name, value in drawn.items()}


def _reference(case: Case, weights: Weights, feeds: dict[str, np.ndarray]) -> torch.Tensor:
    """float64 [T, C], one token and one expert at a time."""
    hidden, logits = (torch.from_numpy(feeds[f"{name}_float"]).double() for name in ("hidden_states", "router_logits"))
    scales = weights.tensors.get("activation_scales")
    result = torch.zeros_like(hidden)
    for token, probabilities in enumerate(torch.softmax(logits, -1)):
        chosen = torch.argsort(probabilities, descending=True, stable=True)[: case.top_k].tolist()
        factor = 1 / float(probabilities[chosen].sum()) if case.normalize else 1.0
        shares = {expert - case.first_local: factor * float(probabilities[expert]) for expert in chosen}
        shares = {expert: share for expert, share in shares.items() if 0 <= expert < case.local}
        for index in range(case.shared):
            shares[case.local + index] = float(torch.sigmoid(torch.tensor(feeds["shared_gate_logits_float"][token, 0])))
        for expert, share in shares.items():
            x = hidden[token] if scales is None else _float8(hidden[token], scales[0])
            active = torch.nn.functional.silu(weights.gate[expert] @ x) * (weights.up[expert] @ x)
            active = active if scales is None else _float8(active, scales[1 + expert])
            result[token] += share * (weights.down[expert] @ active)
    return result


def _float8(values: torch.Tensor, scale: float) -> torch.Tensor:
    """What is left of ``values`` as E4M3 numbers times ``scale``."""
    return (values / float(scale)).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * float(scale)


def _error(found: np.ndarray, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    return float((torch.from_numpy(found).double() - expected).abs().max() / expected.abs().max())


CASES = {
    "plain": Case(),
    "bfloat16": Case(dtype="bfloat16", top_k=3),
    "shared experts": Case(shared=2, normalize=True),
    "three local experts of six": Case(first_local=2, local=3, shared=1),
    "odd sizes": Case(hidden=72, width=24, top_k=4),
    "int8": Case(weights=WeightType.INT8),
    "int8, shared, bfloat16": Case(weights=WeightType.INT8, shared=1, dtype="bfloat16"),
    "int4": Case(weights=WeightType.INT4, group_size=64, hidden=128, normalize=True),
    "fp8, shared": Case(weights=WeightType.FLOAT8, shared=1),
}


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_session_agrees_with_float64_for_any_number_of_tokens(name: str) -> None:
    case = CASES[name]
    weights = Weights.random(case, seed=len(name))
    made = session(moe_model(case.attributes, weights.tensors, case.dtype))
    tolerance = FLOAT8 if case.weights is WeightType.FLOAT8 else TOLERANCES[case.dtype]
    for tokens in (5, 1, 70):
        feeds = _feeds(case, tokens)
        (found,) = made.run(None, feeds)
        assert _error(found, _reference(case, weights, feeds)) < tolerance
    assert made.run(None, _feeds(case, 0))[0].shape == (0, case.hidden)


@needs_kernels
def test_output_has_the_type_and_the_shape_of_the_tokens() -> None:
    """Before the kernel runs: nodes behind it are typed and planned with them."""
    case = Case(dtype="bfloat16", shared=1)
    tensors = Weights.random(case).tensors
    for tokens in ("T", 7):
        made = session(moe_model(case.attributes, tensors, case.dtype, tokens=tokens))
        assert made.get_outputs()[0].shape == [tokens, case.hidden]


@needs_kernels
def test_sessions_share_what_is_registered() -> None:
    case = Case()
    model = moe_model(case.attributes, Weights.random(case).tensors, case.dtype)
    first, second = session(model), session(model)
    feeds = _feeds(case, 3)
    expected = first.run(None, feeds)[0]
    del first
    assert np.array_equal(second.run(None, feeds)[0], expected)


def _refusal(
    case: Case, attributes: dict[str, Any], tensors: dict[str, np.ndarray], casts: dict[str, str] | None = None
) -> str:
    """What ONNX Runtime says of the node when the session is made."""
    with pytest.raises(Exception, match="QwenForgeMoE") as caught:
        session(moe_model(attributes, tensors, case.dtype, casts=casts))
    assert type(caught.value).__module__.startswith("onnxruntime")
    return str(caught.value)


ATTRIBUTES: dict[str, tuple[dict[str, Any], str]] = {
    "above": ({"top_k": 9}, "top_k is 9, above 8 (routed experts of a token)"),
    "below": ({"normalize_topk": -1}, "normalize_topk is -1, below 0"),
    "no multiple": ({"hidden_size": 60}, "hidden_size is 60, no multiple of 8"),
    "not 32 bits": ({"top_k": 2**40}, "top_k is 1099511627776, which is no number of 32 bits"),
    "a float": ({"top_k": 2.0}, "attribute top_k is missing, or is no integer"),
    "a text": ({"layout_version": "1"}, "attribute layout_version is missing, or is no integer"),
    "another layout": ({"layout_version": 2}, "layout_version is 2, above 1 (of the packed weights)"),
    "requirement": ({"top_k": 7}, "top_k is larger than num_experts"),
    "requirement of packed weights": (
        {"weight_type": 2, "group_size": 256},
        "INT4 weights need a group_size of 64 or 128",
    ),
}


@needs_kernels
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_wrong_attribute_is_refused_in_a_sentence(name: str) -> None:
    change, sentence = ATTRIBUTES[name]
    case = Case()
    assert f"QwenForgeMoE 'layer 3': {sentence}" in _refusal(
        case, {**case.attributes, **change}, Weights.random(case).tensors
    )


@needs_kernels
@pytest.mark.parametrize("attribute", [attribute.name for attribute in SPEC.attributes])
def test_missing_attribute_is_named(attribute: str) -> None:
    case = Case()
    model = moe_model(case.attributes, Weights.random(case).tensors, case.dtype)
    (node,) = (node for node in model.graph.node if node.op_type == SPEC.name)
    kept = [item for item in node.attribute if item.name != attribute]
    assert len(kept) == len(node.attribute) - 1
    del node.attribute[:]
    node.attribute.extend(kept)
    with pytest.raises(Exception, match=f"QwenForgeMoE 'layer 3': attribute {attribute} is missing"):
        session(model)


TENSORS: dict[str, tuple[Case, dict[str, np.ndarray | None], str]] = {
    "another width": (
        Case(),
        {"gate_up_weights": np.zeros((6, 100, 64), np.float16)},
        "dimension 1 of gate_up_weights is 100, but 2 * intermediate_size is 128",
    ),
    "too few experts": (
        Case(shared=1),
        {"down_weights": np.zeros((6, 64, 64), np.float16)},
        "dimension 0 of down_weights is 6, but num_local_experts + num_shared_experts is 7",
    ),
    "rank": (Case(), {"down_weights": np.zeros((64, 64), np.float16)}, "down_weights has 2 dimensions, not 3"),
    "other type of weights": (
        Case(),
        {"down_weights": np.zeros((6, 64, 64), np.float32)},
        "down_weights is of type float32, but hidden_states of type float16",
    ),
    "weights that are not packed": (
        Case(weights=WeightType.INT8),
        {"gate_up_weights": np.zeros((6, 128, 64), np.float16)},
        "gate_up_weights is of type float16, not int8",
    ),
    "scales of another type": (
        Case(weights=WeightType.INT8),
        {"down_scales": np.zeros((6, 1, 64), np.float16)},
        "down_scales is of type float16, not float32",
    ),
    "no scales": (
        Case(weights=WeightType.INT8),
        {"gate_up_scales": None},
        "input gate_up_scales is missing, which the attributes ask for",
    ),
    "no last scales": (
        Case(weights=WeightType.FLOAT8),
        {"activation_scales": None},
        "input activation_scales is missing, which the attributes ask for",
    ),
    "scales of no use": (
        Case(),
        {"gate_up_scales": np.zeros((6, 1, 128), np.float16)},
        "input gate_up_scales is given, for which the attributes have no use",
    ),
    "gates of no use": (
        Case(),
        {"shared_gate_logits": np.zeros((5, 1), np.float16)},
        "input shared_gate_logits is given, for which the attributes have no use",
    ),
}


@needs_kernels
@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensor_is_refused_in_a_sentence(name: str) -> None:
    case, changes, sentence = TENSORS[name]
    changed = {**Weights.random(case).tensors, **changes}
    tensors = {key: value for key, value in changed.items() if value is not None}
    assert f"QwenForgeMoE 'layer 3': {sentence}" in _refusal(case, case.attributes, tensors)


@needs_kernels
def test_tokens_of_another_type_are_refused() -> None:
    case = Case()
    tensors = Weights.random(case).tensors
    mixed = _refusal(case, case.attributes, tensors, casts={"router_logits": "bfloat16"})
    assert "QwenForgeMoE 'layer 3': router_logits is of type bfloat16, but hidden_states of type float16" in mixed
    # ONNX Runtime's own words: it knows the types that the first input may have.
    single = _refusal(case, case.attributes, tensors, casts={"hidden_states": "float32"})
    assert "Type 'tensor(float)' of input parameter (hidden_states) of operator (QwenForgeMoE)" in single


@needs_kernels
def test_disagreeing_numbers_of_tokens_are_refused_at_the_call() -> None:
    case = Case()
    made = session(moe_model(case.attributes, Weights.random(case).tensors, case.dtype))
    feeds = {**_feeds(case, 4), "router_logits_float": _feeds(case, 3)["router_logits_float"]}
    with pytest.raises(Exception, match="dimension 0 of router_logits is 3, but tokens of hidden_states is 4"):
        made.run(None, feeds)
    assert made.run(None, _feeds(case, 4))[0].shape == (4, case.hidden)


@needs_kernels
def test_kernel_keeps_to_its_stream_and_gives_everything_back(tmp_path: Path) -> None:
    """Against a stand-in for ONNX Runtime with a stream, whose every call fails once; sanitized."""
    generate_header(tmp_path)
    command = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fsanitize=address,undefined"]
    command += [f"-I{PLUGINS}", f"-I{CPP}", f"-I{tmp_path}", "-isystem", f"{cuda_folder()}/include"]
    command += ["-fno-sanitize-recover=undefined", str(CPP / "ort_kernel.cpp"), str(CPP / "cuda_stub.cpp")]
    sources = ("onnxruntime/kernel.cpp", "onnxruntime/ort_values.cpp", "common/contract.cpp", "common/fields.cpp")
    command += [*(str(PLUGINS / source) for source in sources), "-o", str(tmp_path / "checks")]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    finished = subprocess.run([tmp_path / "checks"], capture_output=True, text=True, check=False, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@needs_library
def test_library_is_registered_and_its_op_waits_for_cuda() -> None:
    case = replace(Case(), shared=1)
    model = moe_model(case.attributes, Weights.random(case).tensors, case.dtype)
    with pytest.raises(Exception, match=r"Could not find an implementation for QwenForgeMoE\(1\) node .*'layer 3'"):
        session(model, ort_library(), "CPUExecutionProvider")


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_library_exports_two_functions_and_nothing_else() -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", ort_library()], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert names == {"RegisterCustomOps", "qwenforgePluginsVersion"}


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_library_is_linked_to_neither_onnx_runtime_nor_cuda() -> None:
    listed = subprocess.run(["readelf", "-d", ort_library()], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", listed.stdout)
    assert needed and not [name for name in needed if re.match(r"lib(onnxruntime|nv|cuda|cudart)", name)]


@needs_library
def test_official_header_is_used_where_it_is_found(tmp_path: Path) -> None:
    """A header that stands for ONNX Runtime's refuses to be compiled: every source that needs it has to meet it."""
    headers, build = tmp_path / "include", tmp_path / "build"
    configure = ("--preset", "plugins", "-B", build, f"-DONNXRUNTIME_INCLUDE_DIR={headers}")
    without = cmake(*configure)
    assert without.returncode and "there is no onnxruntime_c_api.h" in " ".join(without.stderr.split())
    headers.mkdir()
    (headers / "onnxruntime_c_api.h").write_text("#error the official header was read\n", encoding="utf-8")
    assert cmake(*configure).returncode == 0
    sources = sorted(path.name for path in (PLUGINS / "onnxruntime").glob("*.cpp"))
    objects = [f"plugins/CMakeFiles/qwenforge_ort.dir/onnxruntime/{name}.o" for name in sources]
    compiled = cmake("--build", build, "--", "-k", "0", *objects)
    assert sources and compiled.stdout.count("error: #error the official header was read") == len(sources), (
        compiled.stdout
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_interface_has_onnx_runtimes_layout() -> None:
    """Our declaration, and the official header where ONNXRUNTIME_INCLUDE_DIR in the environment names its folder."""
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{PLUGINS}", str(CPP / "ort_abi_layout.cpp")]
    variants: list[list[str]] = [[]]
    if "ONNXRUNTIME_INCLUDE_DIR" in os.environ:
        variants += [["-DQWENFORGE_OFFICIAL_ONNXRUNTIME_HEADERS", f"-I{os.environ['ONNXRUNTIME_INCLUDE_DIR']}"]]
    for more in variants:
        finished = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
