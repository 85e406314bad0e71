"""Whole models of random weights on one GPU, one subject after the other: rows for ``bench/gpu_models.py``.

Each subject has a process of its own, is alone on the GPU (its memory is what the whole GPU then uses more than before)
and answers every batch size. Checkpoints and bundles are made, measured and deleted, one at a time.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwenforge.bench.geometries import Draw, geometry_config, write_checkpoint
from qwenforge.bench.gpu_floors import decode_floor
from qwenforge.bench.latency import Workload, summary
from qwenforge.bench.measured_process import MeasuredProcess
from qwenforge.errors import UserError
from qwenforge.exporter.config import ModelConfig
from qwenforge.tensorrt_choice import Operator


@dataclass(frozen=True)
class Variant:
    """A subject: one of ours, which is an export with these operators, or a peer in transformers.

    Attributes:
        name: in the report.
        operators: attention and experts of an export, ``plugin`` or ``native``; None for transformers.
        compiled: of transformers, torch.compile's backend.
        needs_experts: without them it is the same as another.
    """

    name: str
    operators: tuple[Operator, Operator] | None = None
    compiled: str | None = None
    needs_experts: bool = False


VARIANTS = (
    Variant("qwenforge", operators=("plugin", "plugin")),
    Variant("transformers eager"),
    Variant("transformers compiled", compiled="inductor"),
    Variant("ONNX Runtime's own operators", operators=("native", "native")),
    Variant("qwenforge, ONNX Runtime's attention", operators=("native", "plugin"), needs_experts=True),
)
"""In the order of what says the most. The last two are our graphs too: ONNX Runtime exports none itself."""


@dataclass(frozen=True)
class Setting:
    """Of a measurement: the machine, and how much is asked of each subject.

    Attributes:
        bandwidth: of a copy, in bytes a second, measured.
        used_bytes: gives what the GPU's memory holds now.
        draw: gives the checkpoint's numbers; NumPy's are slow.
        target, device: of an export and of transformers, ``ort-cuda`` and ``cuda`` but in tests.
        library: libqwenforge_ort.so.
        layers: so many in the place of all.
        deadline: of ``time.monotonic``, after which subjects are left out.
        why_not_ours: one sentence where ONNX Runtime cannot run bundles on this GPU.
    """

    bandwidth: float
    used_bytes: Callable[[], int]
    work: Path
    batches: Sequence[int]
    prompt_tokens: int
    new_tokens: int
    runs: int
    library: Path | None = None
    draw: Draw | None = None
    target: str = "ort-cuda"
    device: str = "cuda"
    layers: int | None = None
    deadline: float = float("inf")
    why_not_ours: str | None = None


def rows(setting: Setting, geometries: Sequence[str], variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """One row a model, subject and batch, as soon as it is known; ``left_out`` in a row says why there is no more."""
    for geometry in geometries:
        folder = setting.work / geometry
        settings = geometry_config(geometry, "bf16", setting.layers)
        config = ModelConfig.parse(settings, where=geometry)
        (folder / "config").mkdir(parents=True, exist_ok=True)
        (folder / "config" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        for variant in variants:
            if not config.num_experts and variant.needs_experts:
                continue  # without experts it is the graph of the variant before
            head = {"model": geometry, "layers": config.num_hidden_layers, "subject": variant.name}
            _tell(f"{geometry}: {variant.name}")
            try:
                yield from _variant_rows(setting, head, geometry, variant, folder, config)
            except (UserError, RuntimeError) as error:
                yield head | {"left_out": str(error)[:500]}
            shutil.rmtree(folder / "bundle", ignore_errors=True)
        shutil.rmtree(folder)


def _variant_rows(
    setting: Setting,
    head: Mapping[str, Any],
    geometry: str,
    variant: Variant,
    folder: Path,
    config: ModelConfig,
) -> Iterator[dict[str, Any]]:
    if time.monotonic() > setting.deadline:
        raise UserError("the time for this part was over")
    made: dict[str, Any] = {}
    length = setting.prompt_tokens + setting.new_tokens
    if variant.operators is None:
        name = "transformers-gpu"
        arguments: dict[str, Any] = {
            "checkpoint": str(folder / "config"),
            "max_length": length,
            "compiled": variant.compiled,
            "device": setting.device,
        }
    elif setting.why_not_ours is not None:
        raise UserError(setting.why_not_ours)
    else:
        started = time.monotonic()
        checkpoint = write_checkpoint(
            folder / "checkpoint", geometry, dtype="bf16", layers=setting.layers, draw=setting.draw
        )
        made["checkpoint_seconds"], started = time.monotonic() - started, time.monotonic()
        bundle = folder / "bundle"
        _export(setting, variant.operators, checkpoint, bundle, length)
        made["export_seconds"] = time.monotonic() - started
        name = "qwenforge"
        arguments = {"bundle": str(bundle), "threads": 8, "max_batch": max(setting.batches)}
        if setting.library is not None:
            arguments["plugin_library"] = str(setting.library)
    before, started = setting.used_bytes(), time.monotonic()
    command = [sys.executable, "-P", "-m", "qwenforge.bench.worker"]
    with MeasuredProcess(command, name, arguments) as process:
        made["load_seconds"] = time.monotonic() - started
        for batch in setting.batches:
            if time.monotonic() > setting.deadline:
                yield {**head, "batch": batch, "left_out": "the time for this part was over"}
                continue
            yield {**head, "batch": batch, **made, **_measured(setting, process, batch, config, before)}


def _measured(
    setting: Setting, process: MeasuredProcess, batch: int, config: ModelConfig, before: int
) -> dict[str, Any]:
    """The first run warms up: it compiles and captures."""
    workload = Workload(setting.prompt_tokens, setting.new_tokens, batch, setting.runs)
    times, peak = [], 0
    started = time.monotonic()
    for run in range(1 + setting.runs):
        taken, peak = process.run(
            prompt_tokens=setting.prompt_tokens, new_tokens=setting.new_tokens, batch=batch, seed=run
        )
        if run:
            times.append(taken)
        else:
            warm_up = time.monotonic() - started
    found = summary(process.description, times, workload, peak)
    floor = decode_floor(
        config,
        batch=batch,
        prompt_tokens=setting.prompt_tokens,
        new_tokens=setting.new_tokens,
        bandwidth=setting.bandwidth,
    )
    step = found.itl_ms["p50"]
    return {
        "description": found.description,
        "ttft_ms": asdict(found.ttft_ms),
        "itl_ms": found.itl_ms,
        "tokens_per_second": asdict(found.tokens_per_second),
        "gpu_bytes": setting.used_bytes() - before,
        "host_bytes": found.peak_rss_bytes,
        "warm_up_seconds": warm_up,
        "weights_floor_ms": floor.weights_ms,
        "floor_ms": floor.ms,
        "itl_over_weights_floor": step / floor.weights_ms,
        "itl_over_floor": step / floor.ms,
    }


def _export(
    setting: Setting, operators: tuple[Operator, Operator], checkpoint: Path, bundle: Path, length: int
) -> None:
    """Not verified: a checkpoint of this size takes minutes, and the tests have verified such graphs."""
    from qwenforge.engine.export import export_checkpoint
    from qwenforge.lowering_choice import choose

    attention, experts = operators
    choice = None
    if setting.target == "ort-cuda":
        choice = choose(setting.target, attention=attention, experts=experts)
    export_checkpoint(
        checkpoint,
        bundle,
        target=setting.target,
        dtype="bf16" if setting.target == "ort-cuda" else "fp32",
        weights="copy",
        max_length=length,
        max_batch=max(setting.batches),
        verify_result=False,
        choice=choice,
    )


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
