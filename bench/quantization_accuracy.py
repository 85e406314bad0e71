"""What each recipe costs in accuracy, beside the best known methods on the same model, texts and metrics.

    python -m qwenforge.bench.quantization_accuracy examples/checkpoints/tiny-qwen2 --peers peers --json accuracy.json

Everyone gets the same calibration rows and is judged on the same held-out windows against the same unquantized model in
fp32: perplexity, mean and 99th percentile of KL(unquantized || quantized) in nats, agreement of the best tokens. The
vocabulary projection stays unquantized for everyone, and so do routers.

* qwenforge: each recipe through calibration and :func:`apply_plan`, run by ONNX Runtime.
* NVIDIA ModelOpt: fake-quantized PyTorch models by its own configurations, in an environment of its own.
* llama.cpp: Q8_0, Q4_0 and, where all rows are multiples of 256, Q4_K_M, in an environment of its own, embedding and
  vocabulary projection in float16. Its products round activations to 8 bits by 32, which is in the figures; those of
  its float16 model show what its other arithmetic adds.
* ONNX Runtime's MatMulNBits quantizer (round to nearest, HQQ) on the unquantized graph's dense products; it leaves
  experts unquantized, so that with experts its figures are not of equals.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.bench.circumstances import circumstances
from qwenforge.bench.peers import llama
from qwenforge.bench.peers import nvidia_modelopt as modelopt
from qwenforge.bench.report_file import check_report_file, write_report
from qwenforge.calibration import recipes
from qwenforge.calibration.accuracy import DistributionAccuracy, DistributionComparison
from qwenforge.calibration.calibrate import calibrate
from qwenforge.calibration.data import CalibrationData, load_calibration_data
from qwenforge.calibration.heldout import HeldOutText, load_heldout
from qwenforge.engine.window_runner import WindowRunner
from qwenforge.errors import UserError
from qwenforge.exporter import weights
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.external_data import save_model
from qwenforge.exporter.instantiate import instantiate
from qwenforge.exporter.trace import TracedModel, trace
from qwenforge.graph_passes.pipeline import optimize
from qwenforge.graph_passes.quantize.apply import apply_plan
from qwenforge.graph_passes.quantize.sites import KEPT_BY_DEFAULT, find_sites

Logits = Iterator[npt.NDArray[np.float32]]

_POSITIONS = 512
_ROW_LENGTH = 256


@dataclass(frozen=True)
class Setting:
    """What everybody works on.

    Attributes:
        checkpoint: the model.
        unquantized: its portable graph in fp32 beside its data.
        calibration: rows of tokens with their data.
        heldout: the windows to be judged on.
        folder: for everything that is written on the way.
    """

    checkpoint: Checkpoint
    unquantized: Path
    calibration: CalibrationData
    heldout: HeldOutText
    folder: Path

    @functools.cached_property
    def _traced(self) -> tuple[ir.Model, TracedModel]:
        """The fused graph, and what is known of the trace that it was made of."""
        traced = trace(self.checkpoint, ir.DataType.FLOAT)
        return optimize(traced.model, positions=_POSITIONS).model, traced

    def portable(self) -> ir.Model:
        """A new unquantized portable model in fp32 with lazy weights."""
        fused, traced = self._traced
        return instantiate(fused.clone(), traced, self.checkpoint)


@dataclass(frozen=True)
class Subject:
    """One way to quantize: its name, its group among equals, and its logits on the held-out windows."""

    name: str
    format: str
    logits: Callable[[Setting], Logits]


def our_logits(recipe: recipes.Recipe) -> Callable[[Setting], Logits]:
    """The portable graph with ``recipe`` applied, by ONNX Runtime."""

    def run(setting: Setting) -> Logits:
        model = setting.portable()
        with TemporaryDirectory(dir=setting.folder) as work:
            result = calibrate(setting.portable(), recipe, setting.calibration, work_folder=Path(work))
            apply_plan(model, result.plan)
            path = Path(work) / "quantized.onnx"
            save_model(model, path)
            yield from WindowRunner.from_file(path, whole=True).logits(setting.heldout.windows)

    return run


def onnxruntime_logits(config: str, **arguments: Any) -> Callable[[Setting], Logits]:
    """The unquantized graph with its dense products quantized by ONNX Runtime's own tool."""

    def run(setting: Setting) -> Logits:
        import onnx
        from onnxruntime.quantization import matmul_nbits_quantizer as tool

        model = onnx.load(setting.unquantized)
        sites = find_sites(ir.from_proto(model)).linear.values()
        kept = [site.node.name for site in sites if site.role in KEPT_BY_DEFAULT and site.node.name]
        algorithm = getattr(tool, config)(**arguments)
        quantizer = tool.MatMulNBitsQuantizer(model, algo_config=algorithm, nodes_to_exclude=kept)
        quantizer.process()
        path = setting.folder / f"{config}.onnx"
        quantizer.model.save_model_to_file(str(path), True)
        return WindowRunner.from_file(path, whole=True).logits(setting.heldout.windows)

    return run


def modelopt_logits(python: Path, config: str) -> Callable[[Setting], Logits]:
    """ModelOpt's fake-quantized model, by PyTorch."""

    def run(setting: Setting) -> Logits:
        found = modelopt.logits(
            python,
            setting.checkpoint.folder,
            config,
            setting.calibration.tokens,
            setting.heldout.windows,
            setting.folder,
        )
        return iter(found)

    return run


def llama_logits(python: Path, number_format: llama.Format) -> Callable[[Setting], Logits]:
    """llama.cpp's own quantized model, run by it."""

    def run(setting: Setting) -> Logits:
        folder = setting.folder / "llama.cpp"
        model = llama.build(python, setting.checkpoint.folder, folder, number_format, keep_vocabulary=True)
        return iter(llama.logits(python, model, setting.heldout.windows, folder))

    return run


@dataclass(frozen=True)
class Peers:
    """Interpreters of environments with peers; None for those that are not to be measured."""

    modelopt: Path | None = None
    llama: Path | None = None

    @classmethod
    def in_folder(cls, folder: Path | None) -> Peers:
        """Those of the environments in ``folder``, made where they are missing; None for no peers."""
        if folder is None:
            return cls()
        return cls(
            modelopt=modelopt.environment(folder / "modelopt-environment"),
            llama=llama.environment(folder / "llama-cpp-environment"),
        )

    def versions(self) -> list[str]:
        """What is measured."""
        found = [modelopt.version(self.modelopt)] if self.modelopt is not None else []
        return found + ([llama.version(self.llama)] if self.llama is not None else [])


def subjects(peers: Peers, widths: set[int]) -> list[Subject]:
    """Everybody, equals beside each other, the peers that there are among them.

    ``widths`` are those of the matrices' rows: K-quants need multiples of 256.
    """
    int4 = recipes.get("int4-weight-only")
    found = [
        Subject("qwenforge int8-weight-only", "int8 weights", our_logits(recipes.get("int8-weight-only"))),
        Subject("qwenforge int8-w8a8", "int8 weights and activations", our_logits(recipes.get("int8-w8a8"))),
        Subject("qwenforge fp8", "fp8 weights and activations", our_logits(recipes.get("fp8"))),
        Subject("qwenforge int4-weight-only", "int4 weights, groups of 128", our_logits(int4)),
    ]
    plain = int4.changed(smoothing=None, clipping=False, rounding="nearest")
    found.append(Subject("qwenforge round to nearest", "int4 weights, groups of 128", our_logits(plain)))
    tools: list[tuple[str, str, dict[str, Any]]] = [
        ("symmetric", "DefaultWeightOnlyQuantConfig", {"block_size": 128, "is_symmetric": True}),
        ("with zero points", "DefaultWeightOnlyQuantConfig", {"block_size": 128, "is_symmetric": False}),
        ("HQQ", "HQQWeightOnlyQuantConfig", {"block_size": 128}),
    ]
    for name, config, arguments in tools:
        run = onnxruntime_logits(config, **arguments)
        found.append(Subject(f"ONNX Runtime {name}", "int4 weights, groups of 128", run))
    by_32 = int4.changed(group_size=32)
    found.append(Subject("qwenforge int4-weight-only by 32", "int4 weights, groups of 32", our_logits(by_32)))
    if peers.modelopt is not None:
        for config, weight_format in MODELOPT_CONFIGS.items():
            found.append(Subject(f"ModelOpt {config}", weight_format, modelopt_logits(peers.modelopt, config)))
    if peers.llama is not None:
        for number_format, weight_format in LLAMA_FORMATS.items():
            if number_format != "q4_k_m" or not any(width % llama.K_QUANT_BLOCK for width in widths):
                run = llama_logits(peers.llama, number_format)
                found.append(Subject(f"llama.cpp {number_format.upper()}", weight_format, run))
    return sorted(found, key=lambda subject: subject.format)


MODELOPT_CONFIGS = {
    "INT8_WEIGHT_ONLY_CFG": "int8 weights",
    "INT8_SMOOTHQUANT_CFG": "int8 weights and activations",
    "FP8_DEFAULT_CFG": "fp8 weights and activations",
    "INT4_AWQ_CFG": "int4 weights, groups of 128",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": "int4 weights, groups of 128",
}
"""ModelOpt's configurations and what they quantize."""

LLAMA_FORMATS: dict[llama.Format, str] = {
    "f16": "not quantized",
    "q8_0": "int8 weights",
    "q4_0": "int4 weights, groups of 32",
    "q4_k_m": "int4 weights, groups of 32",
}
"""llama.cpp's formats beside those that are nearest to them: 8.5, 4.5 and 4.5 to 6.6 bits a weight."""


def judge(setting: Setting, logits: Logits) -> DistributionAccuracy:
    """``logits`` against the unquantized model's, window by window."""
    comparison = DistributionComparison()
    windows = setting.heldout.windows
    reference = WindowRunner.from_file(setting.unquantized, whole=True).logits(windows)
    for row, (expected, actual) in enumerate(zip(reference, logits, strict=True)):
        comparison.add(expected, actual, windows[row, 1:].tolist())
    return comparison.result()


def measure(checkpoint: Path, peers: Peers, *, rows: int, windows: int) -> dict[str, Any]:
    """The report: circumstances, settings and the figures of everybody.

    Raises:
        UserError: the checkpoint cannot be opened, or a peer fails.
    """
    circumstances_at_start = circumstances()
    source = Checkpoint.open(checkpoint)
    vocabulary = source.config.vocab_size
    files = source.tokenizer_files
    data = load_calibration_data(None, files, vocab_size=vocabulary, rows=rows, row_length=_ROW_LENGTH)
    text = load_heldout(
        None, files, vocab_size=vocabulary, max_length=_POSITIONS, calibration=data.tokens, windows=windows
    )
    figures = {}
    with TemporaryDirectory(prefix="quantization-") as folder:
        setting = Setting(source, Path(folder) / "unquantized.onnx", data, text, Path(folder))
        save_model(setting.portable(), setting.unquantized)
        widths = {weights.dims(site.weight)[0] for site in find_sites(setting.portable()).linear.values()}
        for subject in subjects(peers, widths):
            found = judge(setting, subject.logits(setting)).to_json()
            found.pop("kl_histogram")
            figures[subject.name] = {"format": subject.format, **found}
            print(f"{subject.format:32} {subject.name:42} KL {found['mean_kl']:.2e}", file=sys.stderr)
    settings = {
        "checkpoint": source.folder.resolve().name,
        "calibration": f"{data.source}: {data.tokens.shape[0]} rows of {data.tokens.shape[1]} tokens",
        "heldout": f"{text.source}: {text.windows.shape[0]} windows of {text.windows.shape[1]} tokens",
        "peers": peers.versions(),
    }
    return {**circumstances_at_start, "settings": settings, "subjects": figures}


def main() -> int:
    """Parse the command line, measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="environments of peers; none are made without it")
    parser.add_argument("--rows", type=int, default=128, help="calibration rows of 256 tokens (default: 128)")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    arguments = parser.parse_args()
    try:
        if arguments.json is not None:
            check_report_file(arguments.json)
        peers = Peers.in_folder(arguments.peers)
        report = measure(arguments.checkpoint, peers, rows=arguments.rows, windows=arguments.windows)
        if arguments.json is not None:
            write_report(arguments.json, report)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    _print(report)
    return 0


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = report["settings"]
    table = Table(title=settings["checkpoint"], caption=f"{settings['calibration']}; {settings['heldout']}")
    for column in ("format", "by", "perplexity", "ratio", "mean KL", "p99 KL", "top 1"):
        table.add_column(column, justify="left" if column in ("format", "by") else "right")
    for name, found in report["subjects"].items():
        figures = (f"{found['perplexity']:.2f}", f"{found['perplexity_ratio']:.4f}", f"{found['mean_kl']:.2e}")
        table.add_row(found["format"], name, *figures, f"{found['p99_kl']:.2e}", f"{found['top1_agreement']:.4f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
