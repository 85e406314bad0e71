"""The plugins' kernels from Python, on any tensors that speak DLPack: for tests and benchmarks, not for users.

Needs nothing of qwenforge installed but bench/ in its namespace. :func:`build` compiles the kernels with nvcc;
:class:`Kernels` calls them. Tensors (torch's, CuPy's, or NumPy's for a library of emulated kernels) are handed over
without a copy, checked against what plugins/*/op.yaml says, and have to live on the library's device.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenforge.bench.attention_call import Attention, attention_arguments
from qwenforge.bench.dlpack import KernelError, Tensor

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"
PATHS = {"table": 0, "eight": 1, "sixteen": 2, "wide": 3, "grouped": 4}
"""qwenforge::MoePath."""
ATTENTION_PATHS = {"auto": 0, "plain": 1, "split": 2, "tiled": 3}
"""qwenforge::AttentionPath."""
WEIGHT_TYPES = {"float": 0, "int8": 1, "int4": 2, "fp8": 3}
"""qwenforge::WeightType."""
ROW_GROUP = 65536
"""``group_size`` of weights with one scale a row."""
_TYPES = ("float16", "bfloat16")


class MoeShape(ctypes.Structure):
    """qwenforge::MoeShape."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in (
                "hidden",
                "width",
                "experts",
                "first_local",
                "local",
                "shared",
                "top_k",
                "normalize",
                "weight_type",
                "group_size",
            )
        ),
    )


@dataclass(frozen=True)
class Experts:
    """The weights of a layer's experts in the packed layout (plugins/moe/README.md), and how they are used.

    gate_up [El + Es, 2 I, C], down [El + Es, C, I]; with INT4 the columns are half as many bytes. Scales as in op.yaml.
    """

    gate_up: Any
    down: Any
    num_experts: int
    top_k: int
    num_shared: int = 0
    normalize: bool = False
    first_local: int = 0
    weight_type: str = "float"
    group_size: int = ROW_GROUP
    gate_up_scales: Any = None
    down_scales: Any = None
    activation_scales: Any = None


class Kernels:
    """The kernels of one library.

    Args:
        library: as :func:`build` makes it.
        allocate: gives a tensor of so many bytes for the workspace, on the library's device.
        stream: gives the CUDA stream's address; the default stream without it.
    """

    def __init__(self, library: Path, allocate: Callable[[int], Any], stream: Callable[[], int] = lambda: 0) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("qwenforgeMoeWorkspaceBytes", "qwenforgeAttentionWorkspaceBytes"):
            getattr(self._library, name).restype = ctypes.c_size_t
        self._allocate, self._stream = allocate, stream
        self._space: dict[int, Any] = {}

    def moe(
        self, hidden: Any, logits: Any, experts: Experts, output: Any, gates: Any = None, path: str = "table"
    ) -> None:
        """The mixture of experts: hidden [T, C], logits [T, E], gates [T, 1] -> output [T, C].

        Raises:
            KernelError: a tensor does not fit its place, or the kernels do not take the shape; the message says which.
        """
        self.prepared_moe(hidden, logits, experts, output, gates, path)()

    def prepared_moe(
        self, hidden: Any, logits: Any, experts: Experts, output: Any, gates: Any = None, path: str = "table"
    ) -> Callable[[], None]:
        """The same as a call that can be made again and again, checked once."""
        shape, tensors, element = _moe_arguments(hidden, logits, experts, output, gates)
        _check(self._library.qwenforgeCheckMoe, shape)
        size = self._library.qwenforgeMoeWorkspaceBytes(ctypes.byref(shape), PATHS[path])
        space = self._workspace(size)
        addresses = _addresses(tensors)

        def call() -> None:
            _require(
                self._library.qwenforgeMoe(
                    ctypes.byref(shape),
                    _TYPES.index(element),
                    ctypes.byref(addresses),
                    ctypes.c_void_p(space.address),
                    ctypes.c_size_t(size),
                    ctypes.c_void_p(self._stream()),
                    PATHS[path],
                ),
                path,
            )

        call.keep = tensors  # type: ignore[attr-defined]
        return call

    def moe_path(self, hidden: Any, logits: Any, experts: Experts, output: Any, gates: Any = None) -> str:
        """The path that the table chooses."""
        shape, _, _ = _moe_arguments(hidden, logits, experts, output, gates)
        return list(PATHS)[int(self._library.qwenforgeMoePath(ctypes.byref(shape)))]

    def attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        positions: Any,
        starts: Any,
        layer: Attention,
        output: Any,
        path: str = "auto",
    ) -> None:
        """Attention: the layer's caches are updated in place, and output [B, S, Hq D] is written.

        Args:
            query: [B, S, Hq D]; where key and value are None packed, [B, S, (Hq + 2 Hk) D].
            key: [B, S, Hk D], as value.
            positions: [B, S] int32, where in the tables the tokens are turned.
            starts: [B] int32, where in the caches they begin.

        Raises:
            KernelError: a tensor does not fit its place, or the kernels do not take the shape; the message says which.
        """
        self.prepared_attention(query, key, value, positions, starts, layer, output, path)()

    def prepared_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        positions: Any,
        starts: Any,
        layer: Attention,
        output: Any,
        path: str = "auto",
    ) -> Callable[[], None]:
        """The same as a call that can be made again and again, checked once."""
        shape, tensors, element = attention_arguments(query, key, value, positions, starts, layer, output)
        _check(self._library.qwenforgeCheckAttention, shape)
        size = self._library.qwenforgeAttentionWorkspaceBytes(ctypes.byref(shape))
        space, addresses = self._workspace(size), _addresses(tensors)

        def call() -> None:
            _require(
                self._library.qwenforgeAttention(
                    ctypes.byref(shape),
                    _TYPES.index(element),
                    ctypes.byref(addresses),
                    ctypes.c_void_p(space.address),
                    ctypes.c_size_t(size),
                    ctypes.c_void_p(self._stream()),
                    ATTENTION_PATHS[path],
                ),
                path,
            )

        call.keep = tensors  # type: ignore[attr-defined]
        return call

    def attention_path(
        self, query: Any, key: Any, value: Any, positions: Any, starts: Any, layer: Attention, output: Any
    ) -> str:
        """The path that ``auto`` stands for."""
        shape, _, _ = attention_arguments(query, key, value, positions, starts, layer, output)
        return list(ATTENTION_PATHS)[int(self._library.qwenforgeAttentionPath(ctypes.byref(shape)))]

    def _workspace(self, size: int) -> Tensor:
        if size not in self._space:
            self._space = {size: Tensor.of("the workspace", self._allocate(max(size, 16)))}
        found: Tensor = self._space[size]
        return found


def build(nvcc: str, folder: Path, cutlass: Path | None = None) -> Path:
    """Compile the kernels for this machine's GPU, its units in parallel; the library's path.

    Args:
        cutlass: folder of CUTLASS's headers; without it there is no grouped GEMM.

    Raises:
        KernelError: nvcc says no; its words are in the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC", f"-I{PLUGINS}"]
    units = [(path, ["-arch=native"]) for path in (*PLUGINS.glob("moe/*.cu"), *PLUGINS.glob("attention/*.cu"))]
    units.append((PLUGINS / "common" / "kernels_c_api.cpp", []))
    if cutlass is None:
        units.append((PLUGINS / "moe" / "cutlass" / "grouped_missing.cpp", []))
    else:
        hopper = ["-gencode=arch=compute_90a,code=sm_90a", f"-isystem={cutlass}", "--expt-relaxed-constexpr"]
        units += [(path, hopper) for path in PLUGINS.glob("moe/cutlass/*.cu")]

    def compile_unit(unit: tuple[Path, list[str]]) -> str:
        source, more = unit
        target = folder / f"{source.parent.name}-{source.stem}.o"
        _run([nvcc, *flags, *more, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, units))
    library = folder / "libqwenforge_kernels.so"
    _run([nvcc, "-shared", *objects, "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise KernelError(f"{' '.join(command)} failed:\n{finished.stderr[-4000:]}")


def _moe_arguments(
    hidden: Any, logits: Any, experts: Experts, output: Any, gates: Any
) -> tuple[MoeShape, list[Tensor | None], str]:
    """The shape, the tensors in the order of qwenforge::MoeTensors, and the element type."""
    x, down = Tensor.of("hidden", hidden), Tensor.of("down", experts.down)
    if len(x.shape) != 2 or len(down.shape) != 3 or x.element not in _TYPES:
        raise KernelError(f"hidden is {x.element} {list(x.shape)} and down {list(down.shape)}: see op.yaml")
    tokens, columns = x.shape
    stored, kind = down.shape[0], WEIGHT_TYPES[experts.weight_type]
    width = down.shape[2] * (2 if experts.weight_type == "int4" else 1)
    shape = MoeShape(
        tokens,
        columns,
        width,
        experts.num_experts,
        experts.first_local,
        stored - experts.num_shared,
        experts.num_shared,
        experts.top_k,
        experts.normalize,
        kind,
        experts.group_size,
    )
    packed, half = kind > 0, 2 if experts.weight_type == "int4" else 1
    weights = "int8" if packed else x.element
    scales = x.element if experts.weight_type == "int4" else "float32"
    group = max(experts.group_size, 1)
    wanted: list[tuple[str, Any, tuple[int, ...], str, bool]] = [
        ("hidden", hidden, (tokens, columns), x.element, True),
        ("logits", logits, (tokens, experts.num_experts), x.element, True),
        ("gate_up", experts.gate_up, (stored, 2 * width, columns // half), weights, True),
        ("down", experts.down, (stored, columns, width // half), weights, True),
        ("gates", gates, (tokens, 1), x.element, experts.num_shared > 0),
        ("gate_up_scales", experts.gate_up_scales, (stored, -(-columns // group), 2 * width), scales, packed),
        ("down_scales", experts.down_scales, (stored, -(-width // group), columns), scales, packed),
        ("activation_scales", experts.activation_scales, (1 + stored,), "float32", experts.weight_type == "fp8"),
        ("output", output, (tokens, columns), x.element, True),
    ]
    tensors: list[Tensor | None] = []
    for name, value, dimensions, element, present in wanted:
        if not present:
            tensors.append(None)
            continue
        tensor = Tensor.of(name, value)
        tensor.require(name, dimensions, element)
        tensors.append(tensor)
    return shape, tensors, x.element


def _check(question: Any, shape: ctypes.Structure) -> None:
    """Raise KernelError with the kernels' own words where they do not take the shape."""
    problem = ctypes.create_string_buffer(512)
    if not question(ctypes.byref(shape), problem, ctypes.c_size_t(len(problem))):
        raise KernelError(problem.value.decode())


def _addresses(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.address for tensor in tensors))


def _require(status: int, what: str) -> None:
    if status:
        raise KernelError(f"the kernels ({what}) returned CUDA error {status}")
