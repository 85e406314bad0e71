"""Times whole models of random weights on this machine's GPU: ``python -P bench/gpu_models.py --json FILE``.

Qwen2-0.5B, 7B and Qwen1.5-MoE-A2.7B in bf16, exported here for ort-cuda, beside transformers (eager, and compiled with
a static cache) and ONNX Runtime's own operators: time to first token, inter-token latency, tokens a second and GPU
memory at each batch size, and how far a step is from reading the weights once at this GPU's copy bandwidth. Rows are
written as they come. Without onnxruntime-gpu our rows say so, and the peers are measured.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MODULES = (
    "torch transformers numpy ml_dtypes onnx onnx_ir onnxscript onnxruntime safetensors tokenizers jinja2 pydantic "
    "psutil yaml rich"
).split()
"""What exporting and running needs (pyproject.toml), as the modules are called."""
MODELS = ("0.5b", "7b", "moe-a2.7b")
BATCHES = (1, 8, 32)
DRAWN = 1 << 26
"""Numbers drawn on the GPU at a time."""


def missing_modules() -> list[str]:
    """Which of :data:`MODULES` this Python lacks."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def why_not_ours() -> str | None:
    """Why ONNX Runtime cannot run bundles on a GPU here; None when it can."""
    from qwenforge.errors import UserError
    from qwenforge.runtime.backends import require_cuda

    try:
        require_cuda()
    except UserError as error:
        return str(error)
    return None


def used_bytes(torch: Any) -> int:
    """What the first GPU's memory holds now, of all processes, but for what torch keeps here for later."""
    torch.cuda.empty_cache()
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20


def drawn(torch: Any) -> Any:
    """Numbers from the GPU, for a checkpoint in bf16."""
    import ml_dtypes

    from qwenforge.bench.geometries import SEED, STANDARD_DEVIATION

    generator = torch.Generator("cuda").manual_seed(SEED)

    def blocks(count: int, mean: float) -> Iterator[Any]:
        for start in range(0, count, DRAWN):
            size = min(DRAWN, count - start)
            block = torch.randn(size, generator=generator, dtype=torch.float32, device="cuda")
            rounded = block.mul_(STANDARD_DEVIATION).add_(mean).to(torch.bfloat16)
            yield rounded.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)

    return blocks


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 where a module or a GPU is missing."""
    args = _parser().parse_args(arguments)
    deadline = time.monotonic() + args.limit
    if missing := missing_modules():
        lacks = f"this Python lacks the modules {', '.join(missing)}: install them"
        print(f"gpu_models.py: error: {lacks}", file=sys.stderr)
        return 1
    from qwenforge.bench.gpu_clock import Machine
    from qwenforge.bench.gpu_model_runs import VARIANTS, Setting, rows
    from qwenforge.bench.gpu_model_table import table
    from qwenforge.bench.kernels import QUICK_ROUNDS, require_gpu

    torch = require_gpu()
    machine = Machine(torch, QUICK_ROUNDS)
    bandwidth, name = machine.bandwidth, machine.name
    del machine  # and what it keeps on the GPU
    report: dict[str, Any] = {
        "gpu": name,
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "transformers": _version("transformers"),
        "copy_bandwidth": bandwidth,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "runs": args.runs,
        "ours_left_out": why_not_ours(),
        "models": [],
    }
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        setting = Setting(
            bandwidth=bandwidth,
            used_bytes=lambda: used_bytes(torch),
            work=Path(folder),
            batches=args.batches,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            runs=args.runs,
            library=args.library,
            draw=drawn(torch),
            layers=args.layers,
            deadline=deadline,
            why_not_ours=report["ours_left_out"],
        )
        for row in rows(setting, args.models, VARIANTS):
            report["models"].append(row)
            print(json.dumps(row), flush=True)
            if args.json is not None:
                partial = args.json.with_name(args.json.name + ".partial")
                partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                os.replace(partial, args.json)
    print("\n".join(table(report["models"])))
    return 0


def _version(module: str) -> str:
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="example: python -P bench/gpu_models.py --models 0.5b,7b --batches 1,8 --json models.json",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, after every row")
    parser.add_argument("--models", type=_models, default=list(MODELS), metavar="MODEL,...", help="in this order")
    parser.add_argument("--batches", type=_counts, default=list(BATCHES), metavar="B,...")
    parser.add_argument("--prompt-tokens", type=_count, default=512, metavar="N")
    parser.add_argument("--new-tokens", type=_count, default=64, metavar="N", help="of each run, from 2 on")
    parser.add_argument("--runs", type=_count, default=3, metavar="N", help="counted runs, after one that warms up")
    parser.add_argument("--layers", type=_count, metavar="N", help="so many in the place of all; the report says so")
    parser.add_argument("--library", type=Path, metavar="FILE", help="libqwenforge_ort.so (default: as qwenforge run)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where checkpoints and bundles are made and deleted")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), metavar="SECONDS", help="leave out what would begin after so long"
    )
    return parser


def _models(text: str) -> list[str]:
    from qwenforge.bench.geometries import GEOMETRIES

    names = text.split(",")
    for name in names:
        if name not in GEOMETRIES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(GEOMETRIES)}")
    return names


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
