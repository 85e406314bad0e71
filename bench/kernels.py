"""Times the plugins' kernels on this machine's GPU beside PyTorch's: ``python bench/kernels.py --json times.json``.

Needs torch with CUDA and nvcc, and nothing of qwenforge installed. Each measurement replays a CUDA graph with a cold
L2; medians with the 10th and 90th percentile, in microseconds. A floor is the larger of bytes over the copy bandwidth
and operations over the matrix rate, both measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"
SOURCES = ("moe/moe.cu", "attention/attention.cu", "common/kernels_c_api.cpp")
FLUSH_BYTES = 256 << 20
REPEATS = 30
TOKENS = (1, 8, 64, 512, 4096)
PATHS = {"plain": 0, "matrix": 1}
"""qwenforge::MoePath."""


class MoeShape(ctypes.Structure):
    """qwenforge::MoeShape."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("hidden", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("experts", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("normalize", ctypes.c_bool),
    )


class AttentionShape(ctypes.Structure):
    """qwenforge::AttentionShape."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "sequence", "capacity", "positions")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "head_size", "window")),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class Layer:
    """The experts of one layer: C, I, E, K and the shared expert's slices."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int
    shared: int
    normalize: bool = False


LAYERS = (
    Layer("Qwen1.5-MoE-A2.7B", 2048, 1408, 60, 4, 4),
    Layer("Qwen2-57B-A14B", 3584, 2560, 64, 8, 8),
    Layer("Qwen3-30B-A3B", 2048, 768, 128, 8, 0, normalize=True),
)


@dataclass(frozen=True)
class Time:
    """Microseconds: median, 10th and 90th percentile."""

    median: float
    low: float
    high: float


class Machine:
    """The GPU: its name, and its copy bandwidth (bytes a second) and bf16 matrix rate (operations a second) today."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.name = torch.cuda.get_device_name()
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        data = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(data)
        self.bandwidth = 2 * data.numel() / (self.time(lambda: target.copy_(data)).median * 1e-6)
        square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        self.rate = 2 * 8192**3 / (self.time(lambda: square @ square).median * 1e-6)

    def time(self, call: Callable[[], Any]) -> Time:
        """The time of ``call`` replayed as a CUDA graph, L2 flushed before each."""
        torch = self.torch
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        times = []
        for _ in range(REPEATS):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        times.sort()
        return Time(statistics.median(times), times[len(times) // 10], times[len(times) * 9 // 10])

    def floor(self, read: float, operations: float) -> float:
        """Microseconds below which nobody gets."""
        return float(1e6 * max(read / self.bandwidth, operations / self.rate))


def build(nvcc: str, folder: Path) -> ctypes.CDLL:
    """The kernels as a shared library for this GPU."""
    library = folder / "libqwenforge_kernels.so"
    command = [nvcc, "-std=c++17", "-O3", "-arch=native", "-lineinfo", "-shared", "-Xcompiler=-fPIC", f"-I{PLUGINS}"]
    subprocess.run([*command, *(str(PLUGINS / name) for name in SOURCES), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("qwenforgeMoeWorkspaceBytes", "qwenforgeAttentionWorkspaceBytes"):
        getattr(loaded, name).restype = ctypes.c_size_t
    return loaded


def moe_rows(machine: Machine, kernels: ctypes.CDLL, layers: tuple[Layer, ...]) -> Iterator[dict[str, Any]]:
    """One row a layer, number of tokens and routing."""
    torch = machine.torch
    for layer in layers:
        stored = layer.experts + layer.shared
        scale = layer.hidden**-0.5
        gate_up = torch.randn(stored, 2 * layer.width, layer.hidden, dtype=torch.bfloat16, device="cuda") * scale
        down = torch.randn(stored, layer.hidden, layer.width, dtype=torch.bfloat16, device="cuda") * layer.width**-0.5
        for tokens in TOKENS:
            for routing in ("uniform", "skewed"):
                yield _moe_row(machine, kernels, layer, tokens, routing, gate_up, down)
        del gate_up, down


def _moe_row(
    machine: Machine, kernels: ctypes.CDLL, layer: Layer, tokens: int, routing: str, gate_up: Any, down: Any
) -> dict[str, Any]:
    torch = machine.torch
    x = torch.randn(tokens, layer.hidden, dtype=torch.bfloat16, device="cuda")
    logits = torch.randn(tokens, layer.experts, dtype=torch.bfloat16, device="cuda")
    if routing == "skewed":  # popularity falls as a power of the rank
        logits += 2 * torch.arange(1, layer.experts + 1, device="cuda").float().log().neg().to(torch.bfloat16)
    gates = torch.randn(tokens, 1, dtype=torch.bfloat16, device="cuda")
    output = torch.empty_like(x)
    shape = MoeShape(tokens, layer.hidden, layer.width, layer.experts, layer.shared, layer.top_k, layer.normalize)
    workspace = torch.empty(kernels.qwenforgeMoeWorkspaceBytes(ctypes.byref(shape)), dtype=torch.uint8, device="cuda")
    tensors = _addresses([x, logits, gate_up, down, gates if layer.shared else None, output])

    def ours(path: int) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        size = ctypes.c_size_t(workspace.numel())
        space = ctypes.c_void_p(workspace.data_ptr())
        _require(kernels.qwenforgeMoe(ctypes.byref(shape), 1, ctypes.byref(tensors), space, size, stream, path))

    chosen = torch.softmax(logits.float(), -1).topk(layer.top_k, -1)[1]
    touched = chosen.unique().numel() + layer.shared
    matrices = 3 * layer.hidden * layer.width
    assignments = tokens * (layer.top_k + layer.shared)
    floor = machine.floor(2.0 * touched * matrices, 2.0 * assignments * matrices)
    expected = _grouped(torch, layer, x, logits, gates, gate_up, down)().float()
    row: dict[str, Any] = {
        "layer": layer.name,
        "tokens": tokens,
        "routing": routing,
        "floor_us": floor,
    }
    for name, path in PATHS.items():
        time = machine.time(lambda path=path: ours(path))  # type: ignore[misc]
        row[name] = {
            "us": asdict(time),
            "percent_of_floor": 100 * floor / time.median,
            "tflops": 2e-6 * assignments * matrices / time.median,
            "relative_difference": float((output.float() - expected).abs().max() / expected.abs().max()),
        }
    if torch.cuda.get_device_capability() >= (9, 0):
        row["torch_grouped_mm_us"] = asdict(machine.time(_grouped(torch, layer, x, logits, gates, gate_up, down)))
    return row


def _grouped(torch: Any, layer: Layer, x: Any, logits: Any, gates: Any, gate_up: Any, down: Any) -> Callable[[], Any]:
    """The same layer with torch._grouped_mm over sorted tokens; weights in our layout, read as they are."""

    def call() -> Any:
        tokens = x.shape[0]
        weights, ids = torch.softmax(logits.float(), -1).topk(layer.top_k, -1)
        if layer.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if layer.shared:
            extra = torch.arange(layer.experts, layer.experts + layer.shared, device="cuda").expand(tokens, -1)
            ids = torch.cat([ids, extra], 1)
            weights = torch.cat([weights, torch.sigmoid(gates.float()).expand(-1, layer.shared)], 1)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(layer.experts + layer.shared, dtype=torch.int32, device="cuda")
        counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        ends = counts.cumsum(0).to(torch.int32)
        rows = x[order // ids.shape[1]]
        both = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
        gate, up = both.view(-1, layer.width // 8, 2, 8).unbind(2)
        active = (torch.nn.functional.silu(gate) * up).reshape(-1, layer.width)
        partial = torch._grouped_mm(active, down.transpose(1, 2), offs=ends)
        result = torch.zeros_like(x, dtype=torch.float32)
        result.index_add_(0, order // ids.shape[1], partial.float() * weights.flatten()[order, None])
        return result.to(x.dtype)

    return call


def attention_rows(machine: Machine, kernels: ctypes.CDLL) -> Iterator[dict[str, Any]]:
    """Decode with the heads of Qwen2-7B, one row a batch and length."""
    torch = machine.torch
    heads, kv_heads, size = 28, 4, 128
    for batch in (1, 8, 32):
        for length in (1024, 4096, 32768):
            cache = (batch, kv_heads, length, size)
            keys, values = (torch.randn(cache, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            query = torch.randn(batch, 1, heads * size, dtype=torch.bfloat16, device="cuda")
            key, value = (torch.randn(batch, 1, kv_heads * size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            table = torch.ones(length, size // 2, dtype=torch.bfloat16, device="cuda")
            positions = torch.full((batch, 1), length - 1, dtype=torch.int32, device="cuda")
            starts = torch.full((batch,), length - 1, dtype=torch.int32, device="cuda")
            output = torch.empty_like(query)
            shape = AttentionShape(batch, 1, length, length, heads, kv_heads, size, 0, 1 / math.sqrt(size))
            bytes_needed = kernels.qwenforgeAttentionWorkspaceBytes(ctypes.byref(shape))
            workspace = torch.empty(bytes_needed, dtype=torch.uint8, device="cuda")
            tensors = _addresses([query, key, value, table, table, positions, starts, keys, values, output])

            def ours(shape: Any = shape, tensors: Any = tensors, workspace: Any = workspace) -> None:
                stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
                size, space = ctypes.c_size_t(workspace.numel()), ctypes.c_void_p(workspace.data_ptr())
                _require(kernels.qwenforgeAttention(ctypes.byref(shape), 1, ctypes.byref(tensors), space, size, stream))

            def sdpa(query: Any = query, keys: Any = keys, values: Any = values) -> Any:
                split = query.view(query.shape[0], 1, heads, size).transpose(1, 2)
                return torch.nn.functional.scaled_dot_product_attention(split, keys, values, enable_gqa=True)

            floor = machine.floor(2.0 * 2 * keys.numel(), 4.0 * batch * heads * length * size)
            time = machine.time(ours)
            yield {
                "batch": batch,
                "length": length,
                "floor_us": floor,
                "qwenforge_us": asdict(time),
                "percent_of_floor": 100 * floor / time.median,
                "torch_sdpa_us": asdict(machine.time(sdpa)),
            }


def _addresses(tensors: list[Any]) -> Any:
    """The struct of pointers that the kernels take."""
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def _require(status: int) -> None:
    if status:
        raise RuntimeError(f"the kernels returned CUDA error {status}")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; 1 where there is no GPU or no compiler."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--nvcc", default=shutil.which("nvcc"), help="the CUDA compiler (default: the one on PATH)")
    args = parser.parse_args(arguments)
    try:
        import torch
    except ModuleNotFoundError:
        print("bench/kernels.py: error: torch is not installed", file=sys.stderr)
        return 1
    if not torch.cuda.is_available() or args.nvcc is None:
        missing = "no NVIDIA GPU is visible" if args.nvcc else "nvcc is not on PATH"
        print(f"bench/kernels.py: error: {missing}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        kernels = build(args.nvcc, Path(folder))
        machine = Machine(torch)
        report: dict[str, Any] = {
            "gpu": machine.name,
            "torch": torch.__version__,
            "copy_bandwidth": machine.bandwidth,
            "bf16_rate": machine.rate,
            "moe": [],
            "attention": [],
        }
        for part, rows in (
            ("moe", moe_rows(machine, kernels, LAYERS)),
            ("attention", attention_rows(machine, kernels)),
        ):
            for row in rows:
                report[part].append(row)
                print(part, json.dumps(row), flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
